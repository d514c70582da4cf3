"""The foundation model of the paper's experiments: a small ViT that the cloud pre-trains without labels, once.

It is a folder that any loader of ViTs reads, in the cache, under a name that says what it was made of.
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
"""Half a million images, about 5 minutes of a core."""

QUICK = MaskedSettings(steps=800)
"""About a minute of a core."""


def pretrained(settings: MaskedSettings, images: Images, progress: Progress = silent) -> Path:
    """The folder of an encoder that was pre-trained on ``images``; their labels are not looked at.

    Raises:
        DataError: Images that the settings do not fit.
        NotFinite: The loss.
        CacheNotWritable: The cache.
    """
    folder = (cache_folder() / f"vit-{_digest(settings, images)}").absolute()
    if folder.is_dir():
        return folder
    make_room_for(folder, CacheNotWritable)
    with one_at_a_time(folder):
        if not folder.is_dir():  # another process may have made the same meanwhile
            encoder = pretrain(settings, images.pixels_NCHW(), progress)
            with replacing_folder(folder, CacheNotWritable) as scratch:
                encoder.save_pretrained(scratch)
    return folder


def _digest(settings: MaskedSettings, images: Images) -> str:
    made_of = f"{LEARNED_BY} {settings.model_dump_json()} {digest_of({'grey': images.grey_NHW})}"
    return hashlib.sha256(made_of.encode()).hexdigest()[:16]
