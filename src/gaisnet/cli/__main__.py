"""``python -m gaisnet.cli`` is the command ``gaisnet``."""

from gaisnet.cli.app import app

app()
