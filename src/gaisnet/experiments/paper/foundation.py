"""The foundation model of the paper's experiments: a small ViT that the cloud pre-trains without labels, once.

It is a folder that any loader of ViTs reads, in the cache, under a name that says what it was made of.
"""

import hashlib
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from gaisnet.checkpoint import digest_of, writing
from gaisnet.experiments.images import Images
from gaisnet.locks import one_at_a_time
from gaisnet.models.foundation import cache_folder
from gaisnet.models.masked import LEARNED_BY, MaskedSettings, pretrain
from gaisnet.progress import Progress, silent

FULL = MaskedSettings()
"""Half a million images, about 5 minutes of a core."""

QUICK = MaskedSettings(steps=800)
"""About a minute of a core."""


def pretrained(settings: MaskedSettings, images: Images, progress: Progress = silent) -> Path:
    """The folder of an encoder that was pre-trained on ``images``; their labels are not looked at.

    Raises:
        DataError: Images that the settings do not fit.
        NotFinite: The loss.
        OutputNotWritable: The cache.
    """
    folder = (cache_folder() / f"vit-{_digest(settings, images)}").absolute()
    if folder.is_dir():
        return folder
    with ExitStack() as alone:
        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            alone.enter_context(one_at_a_time(folder))
        if not folder.is_dir():  # another process may have made the same meanwhile
            _make(folder, settings, images, progress)
    return folder


def _make(folder: Path, settings: MaskedSettings, images: Images, progress: Progress) -> None:
    with writing(folder):
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="pretraining-"))
    try:
        encoder = pretrain(settings, images.pixels_NCHW(), progress)
        with writing(folder):
            encoder.save_pretrained(scratch)
            if not folder.is_dir():
                scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _digest(settings: MaskedSettings, images: Images) -> str:
    made_of = f"{LEARNED_BY} {settings.model_dump_json()} {digest_of({'grey': images.grey_NHW})}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
