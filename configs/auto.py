"""Your own images, with a recipe read off them: the size of images or windows, network, loss, augmentation, length.

python -m unet_jax.main --config=configs/auto.py --config.data.root=FOLDER --mode=check
python -m unet_jax.main --config=configs/auto.py --config.data.root=FOLDER --config.train.minutes=60

Each rule prints what it sets and why; a field that is given as a flag stays as it is. The whole recipe is then in the
work directory, recipe.py, to be copied here and edited. The rules: README.md in this folder.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.auto = True
    config.data.name = "folder"
    config.data.root = "data/folder"
    return config
