"""DRIVE: retinal vessels, many of them one pixel wide, in photographs at their own size of 565x584.

python -m unet_jax.main --config=configs/drive.py --config.data.root=FOLDER

F1 of the vessels within the field of view, at full size: 0.813 on average over 4 folds of 15 + 5 photographs, after 42
minutes of CPU time each; with --config.train.epochs=40.0, after 17 minutes, 0.807.

The folder holds training/, as published at drive.grand-challenge.org. Pixels outside of the field of view are ignored.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "drive"
    config.data.variant = "binary"
    config.data.root = "data/DRIVE"
    config.data.size = ()
    config.data.foreground = 0.0  # every window shows vessels

    config.model.features = (16, 32, 64, 128)

    config.augment.crop = (128, 128)
    config.augment.flip_horizontal = True
    config.augment.flip_vertical = True
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2
    config.augment.gamma = 0.2

    config.loss.cross_entropy = 0.5  # and half Dice: worth 0.02 of F1; class weights and balanced windows, nothing
    config.loss.dice = 0.5

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.decayed = "kernels"
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.99
    config.optimizer.ema_statistics = True
    config.train.batch_size = 8
    config.train.epochs = 100.0
    config.train.eval_every_epochs = 20.0
    config.train.checkpoint_every_epochs = 5.0
    config.eval.best_metric = "dice/vessel"
    config.eval.tta = "auto"  # both flips
    return config
