"""The foundation model of the paper's experiments: a small ViT, pre-trained once without labels.

The result is a folder in the cache that any ViT loader reads. Its name says how it was made.
"""

import hashlib
from pathlib import Path

from gaisnet.checkpoint import digest_of, make_room_for, replacing_folder
from gaisnet.data.images import Images
from gaisnet.errors import CacheNotWritable
from gaisnet.locks import one_at_a_time
from gaisnet.models.foundation import cache_folder
from gaisnet.models.masked_autoencoder import LEARNED_BY, MaskedSettings, pretrain
from gaisnet.progress import Progress, silent

FULL = MaskedSettings()
"""Half a million images: about 5 minutes on one core."""

QUICK = MaskedSettings(steps=800)
"""About a minute on one core."""


def pretrained(settings: MaskedSettings, images: Images, progress: Progress = silent) -> Path:
    """Return the folder of an encoder that was pre-trained on ``images``; labels are not used.

    Raises:
        DataError: The settings do not fit the images.
        NotFinite: The loss is not finite.
        CacheNotWritable: The cache cannot be written.
    """
    folder = (cache_folder() / f"vit-{_digest(settings, images)}").absolute()
    if folder.is_dir():
        return folder
    make_room_for(folder, CacheNotWritable)
    with one_at_a_time(folder):
        if not folder.is_dir():  # another process may have finished the same model meanwhile
            encoder = pretrain(settings, images.pixels_NCHW(), progress)
            with replacing_folder(folder, CacheNotWritable) as scratch:
                encoder.save_pretrained(scratch)
    return folder


def _digest(settings: MaskedSettings, images: Images) -> str:
    made_of = f"{LEARNED_BY} {settings.model_dump_json()} {digest_of({'grey': images.grey_NHW})}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
