"""ISBI 2012, the recipe of the U-Net paper: 572x572 -> 388x388, one tile per step, weight map, elastic deformation.

python -m unet_jax.main --config=configs/isbi2012.py --config.data.root=FOLDER

The full 1,000 epochs have not been run. With --config.train.epochs=24 --config.train.eval_every_epochs=4: V_rand 0.780
on 5 held-out slices, averaged over 7 rotations, after 42 minutes on 2 CPU cores.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "isbi2012"
    config.data.root = "data/isbi2012"
    config.data.size = (512, 512)

    config.model.features = (64, 128, 256, 512, 1024)
    config.model.padding = "valid"
    config.model.dropout = 0.5
    config.model.norm = "none"
    config.model.kernel_init = "paper"

    config.augment.crop = (388, 388)
    config.augment.rotate = 180.0
    config.augment.shift = 0.1
    config.augment.elastic = 10.0
    config.augment.interpolation = "cubic"
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2

    config.loss.border_weight = 10.0

    config.optimizer.name = "sgd"
    config.optimizer.momentum = 0.99
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_epochs = 1.0
    # Not in the paper: with a momentum of 0.99, one steep gradient can undo a training.
    config.optimizer.clip_norm = 1.0
    config.train.batch_size = 1
    config.train.epochs = 1000.0
    config.train.eval_every_epochs = 20.0
    config.train.checkpoint_every_epochs = 5.0

    config.eval.em_scores = True
    config.eval.tta = "rotations"
    return config
