"""The foundation model of the paper's experiments: a small ViT that the cloud pre-trains without labels, once.

It is a folder that any loader of ViTs reads, in the cache, under a name that says what it was made of.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

from gaisnet.checkpoint import digest_of, writing
from gaisnet.experiments.images import Images
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
    folder = cache_folder() / f"vit-{_digest(settings, images)}"
    if folder.is_dir():
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="pretraining-"))
    try:
        encoder = pretrain(settings, images.pixels_NCHW(), progress)
        with writing(folder):
            encoder.save_pretrained(scratch)
            if not folder.is_dir():  # another process may have made the same meanwhile
                scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _digest(settings: MaskedSettings, images: Images) -> str:
    made_of = f"{LEARNED_BY} {settings.model_dump_json()} {digest_of({'grey': images.grey_NHW})}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
