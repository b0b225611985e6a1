"""CARLA street scenes, 23 classes, at 96x128, with the CARLA network (8,640,471 parameters).

python -m unet_jax.main --config=configs/carla.py --config.data.root=FOLDER_OR_ZIP

Pixel accuracy 0.900, mean IoU 0.251 on 149 frames of six held-out drives, after 33 minutes on 2 CPU cores.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "carla"
    config.data.variant = "carla23"
    config.data.root = "data/carla"
    config.data.size = (96, 128)

    config.model.features = (32, 64, 128, 256, 512)
    config.model.upsample = "transposed_3x3"
    config.model.dropout = 0.3
    config.model.dropout_on_skip = True
    config.model.norm = "none"
    config.model.extra_conv = True

    config.augment.flip_horizontal = True
    config.augment.rotate = 5.0
    config.augment.scale = 0.3
    config.augment.shift = 0.1
    config.augment.brightness = 0.15
    config.augment.contrast = 0.3
    config.augment.gamma = 0.3

    config.optimizer.warmup_epochs = 1.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.995
    config.train.batch_size = 8
    config.train.epochs = 36.0
    config.train.eval_every_epochs = 3.0
    return config
