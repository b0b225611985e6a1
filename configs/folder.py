"""Your own images: a folder with images/ and masks/, paired by name. Check them first, then train:

python -m unet_jax.main --config=configs/folder.py --config.data.root=FOLDER --mode=check
python -m unet_jax.main --config=configs/folder.py --config.data.root=FOLDER

How good and how fast depends on the images; configs/camvid.py and configs/carvana.py are measured examples on top of
this file. Names, formats, splits and label values: see unet_jax/data/README.md and config.data in configs/default.py.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "folder"
    config.data.root = "data/folder"
    config.data.size = (256, 256)

    config.model.name = "encoder_unet"  # starts from ImageNet weights
    config.model.features = (64, 96, 192)  # of the decoder: the head is at stride 4
    config.model.upsample = "nearest"

    config.augment.flip_horizontal = True
    config.augment.rotate = 15.0
    config.augment.scale = 0.2
    config.augment.shift = 0.05
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2
    config.augment.gamma = 0.2

    config.loss.cross_entropy = 0.5
    config.loss.dice = 0.5

    config.optimizer.name = "adamw"
    config.optimizer.weight_decay = 0.01
    config.optimizer.decayed = "kernels"
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.99
    config.optimizer.ema_statistics = True
    config.train.batch_size = 8
    config.train.epochs = 100.0
    config.train.eval_every_epochs = 5.0
    config.train.checkpoint_every_epochs = 5.0
    return config
