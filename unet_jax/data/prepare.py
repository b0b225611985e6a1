"""Writing a data set by TFDS, with errors that a user can act on."""

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from unet_jax.errors import UserError


def prepare(
    builder: tfds.core.DatasetBuilder, download_config: tfds.download.DownloadConfig | None = None
) -> tfds.core.DatasetBuilder:
    """Writes the data set of `builder`, or finds it written; returns the builder.

    Raises:
      UserError: one that the builder raised; an archive that is not the published one; no space or right to write.
    """
    try:
        builder.download_and_prepare(download_config=download_config)
    except Exception as error:  # TFDS wraps what a generator raises
        cause = error
        while cause is not None and not isinstance(cause, UserError | NonMatchingChecksumError | OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, NonMatchingChecksumError):
            raise UserError(f"not the published archive: {cause}") from error
        raise UserError(f"{builder.name} cannot be prepared in {builder.data_path.parent}: {cause}") from error
    return builder


def files(builder: tfds.core.DatasetBuilder) -> tuple[epath.Path, ...]:
    """The files that hold the examples of a data set that is written."""
    return tuple(path for _, split in sorted(builder.info.splits.items()) for path in split.filepaths)
