"""Data sets that TFDS prepares: its errors as errors that a user can act on, and the files it writes."""

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from unet_jax import paths
from unet_jax.errors import UserError


def prepare(builder: tfds.core.DatasetBuilder, manual_dir: epath.Path | None = None) -> tfds.core.DatasetBuilder:
    """Writes the data set of `builder`, unless it is already written; returns the builder.

    Archives that are in `manual_dir` are not downloaded.

    Raises:
      UserError: one that the builder raised; an archive other than the published one; no space or permission to write,
        or a folder that TFDS cannot write to.
    """
    paths.check_utf8("TFDS_DATA_DIR", builder.data_path.parent)
    try:
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    except Exception as error:  # TFDS wraps the exceptions of a generator
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


def prepared_files(builder: tfds.core.DatasetBuilder) -> tuple[epath.Path, ...]:
    """The files with the examples of a prepared data set."""
    return tuple(path for _, split in sorted(builder.info.splits.items()) for path in split.filepaths)
