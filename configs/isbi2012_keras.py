"""ISBI 2012 with the Keras U-Net (34,512,193 parameters): padded, 256x256 patches, one sigmoid, Adam.

python -m unet_jax.main --config=configs/isbi2012_keras.py --config.data.root=FOLDER

The full 60,000 steps have not been run. With --config.train.epochs=30 --config.train.eval_every_epochs=10: V_rand 0.785
on 5 held-out slices, after 23 minutes on 2 CPU cores.
"""

from configs import default


def get_config():
    config = default.get_config()
    config.data.name = "isbi2012"
    config.data.variant = "binary"
    config.data.root = "data/isbi2012"
    config.data.size = (512, 512)

    config.model.features = (64, 128, 256, 512, 1024)
    config.model.upsample = "nearest"
    config.model.dropout = 0.5
    config.model.norm = "none"

    config.augment.crop = (256, 256)
    # The source augments with Keras' ImageDataGenerator, but does not give its settings.
    config.augment.flip_horizontal = True
    config.augment.flip_vertical = True
    config.augment.rotate = 10.0
    config.augment.scale = 0.1
    config.augment.shift = 0.05

    config.optimizer.schedule = "constant"
    config.train.batch_size = 2  # not given by the source
    config.train.epochs = 6666.7  # its 200 epochs of 300 steps
    config.train.eval_every_epochs = 33.3
    config.train.checkpoint_every_epochs = 33.3

    config.eval.em_scores = True
    return config
