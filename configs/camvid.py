"""CamVid, in the form of SegNet's tutorial: 11 classes of street scenes, 480x360, at 192x256.

python -m unet_jax.main --config=configs/camvid.py --config.data.root=FOLDER/CamVid

Mean IoU 0.600 on 8 validation frames (34 frames to train on, not the whole data set), after 3 minutes on 2 CPU cores.

The folder holds train/, trainannot/, val/, valannot/ (and test/, testannot/) and the lists train.txt, val.txt and
test.txt. Label 11, void, is ignored.
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
    config.data.size = (192, 256)

    config.loss.class_weights = ("sqrt",)
    config.train.epochs = 60.0
    return config
