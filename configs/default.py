"""Every field there is, with its default; the other files change a few of them.

Never change a default: a work directory written before the field existed was trained with it. What should be different
goes into the file of an experiment.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of the weights, the order of examples, augmentation and dropout
    config.deterministic = False  # bit-equal repeats on GPUs too, with slower kernels where needed
    config.auto = False  # fields at their default are read off the training images, see configs/README.md
    config.keep = ()  # fields that auto and augment.strength leave at their default; flags are kept anyway
    config.init_from = ""  # work directory whose weights to start from; a head for other classes is initialised
    config.init_parts = ()  # prefixes of the weights to take from init_from, as ("encoder",); () is all of them

    config.data = ConfigDict()
    config.data.name = "shapes"  # shapes | carla | oxford_iiit_pet | isbi2012 | drive | folder
    # shapes: multiclass | multilabel; carla: carla23 | lyft13; pets: trimap | binary; the others: multiclass | binary
    config.data.variant = "multiclass"
    config.data.root = ""  # folder or archive of the images; see the module of the data set
    # Height, width that images are resized to; the labels are scored at this size. () keeps each image at its own size:
    # the network sees windows of config.augment.crop, and the labels are scored at the size of the image
    config.data.size = (96, 96)
    config.data.scale = 1.0  # size=(): factor on the size of each image
    # folder only, size=(): instead of the factor, how large a pixel is that images are scaled to, as their files tell:
    # micrometres, or units of the map for GeoTIFF; 0 is as it is
    config.data.pixel_size = 0.0
    # size=(): share of the windows that are centred on a pixel of a class drawn evenly; finds what few windows show (8
    # of 8 objects, against none), and makes little difference where most show all classes, see README.md
    config.data.foreground = 1 / 3
    config.data.resize = "bilinear"  # of images: bilinear (antialiased) | nearest; labels are always nearest
    config.data.validation = 0.2  # share of the images held out, if the data set has no split of its own
    config.data.cache_gib = 16.0  # of disk for the resized images of all data sets; 0 is no cache
    config.data.shapes_seed = 0  # shapes only: of the images
    config.data.shapes_train = 800  # shapes only: number of training images
    config.data.shapes_validation = 100  # shapes only: number of validation images, and of test images
    # What the network is given: range: black to white as 0 to 1 | percentile: likewise, but 0.1 % to 99.9 % of the
    # training images | standard: with their mean 0 and deviation 1 | network: as the pretrained encoder was trained |
    # "": network if it has one, else range for 8 bits and percentile for more
    config.data.normalize = ""
    config.data.show = ()  # numbers of the one or three channels that pictures show, from 0; () is the first ones
    # folder only; labels, channels and dtype are inferred from the files where they are not set
    config.data.images = ("images",)  # folders below root
    config.data.masks = ("masks",)  # as many, in the same order
    config.data.mask_suffix = "_mask"  # that the name of a mask may have after that of its image
    config.data.labels = ()  # of mask values, as ("0 background", "255 -> 1 cell") or ("128 0 64 -> 2 car",)
    config.data.channels = 0  # of the images: 1 grey, 3 colours, or as many as all of them have
    config.data.dtype = ""  # of the images: uint8 | uint16 | float32
    config.data.value_range = ()  # (low, high) that become 0 and 1, for images of more than 8 bits; see normalize
    config.data.pages = ""  # of a TIFF file: channels reads several pages as channels; "" wants one image a file
    # as_stored | upright: turned as the EXIF data of a photo say, and so are predictions. Most programs that draw masks
    # ignore these data, as NumPy, OpenCV and Pillow do
    config.data.orientation = "as_stored"
    config.data.lists = ()  # files below root that name the images for training, validation and maybe test
    config.data.group = ""  # regular expression; images whose names agree in it stay in one split, as frames of a video

    config.model = ConfigDict()
    # unet: see unet_jax/models/unet.py | encoder_unet: a pretrained encoder, see unet_jax/models/encoder_unet.py
    config.model.name = "unet"
    config.model.features = (16, 32, 64, 128)  # width of each level, top to bottom; encoder_unet: of the decoder
    config.model.padding = "same"  # same | valid (unet only)
    config.model.upsample = "transposed_2x2"  # transposed_2x2 | transposed_3x3 | nearest | bilinear
    config.model.dropout = 0.0  # rate at the end of the two lowest encoder blocks
    config.model.dropout_on_skip = False  # whether the lowest skip is taken after its dropout
    config.model.norm = "batch"  # none | batch | group
    config.model.extra_conv = False  # one more 3x3 convolution before the head
    config.model.block = "plain"  # of the encoder: plain | residual (unet only)
    config.model.kernel_init = "he"  # he | paper: of the weights
    config.model.deep_supervision = 0  # levels below the top whose logits training sees too, each at half the weight
    config.model.remat = ()  # levels, 0 is the top, whose activations are rematerialised to save memory
    # encoder_unet only
    config.model.encoder = "efficientnet_lite0"  # efficientnet_lite0 | _lite1 | _lite2 | resnet18 | resnet34 | resnet50
    config.model.pretrained = "imagenet"  # weights of the encoder: imagenet | a file | hf://ORGANISATION/NAME | "" none
    config.model.encoder_norm = "batch"  # batch: statistics of the batch, as it trains | frozen: those of its weights
    config.model.dtype = "float32"  # of the computation: float32 | bfloat16 (GPU, TPU); weights stay float32

    config.augment = ConfigDict()  # all off: 0, False, ()
    # 0..2, instead of setting each field: those that are off get this times their value in training/augment.py, of
    # flip_horizontal, rotate, scale, shift, brightness, contrast, gamma, blur, noise; in colour hue and saturation too
    config.augment.strength = 0.0
    config.augment.flip_horizontal = False
    config.augment.flip_vertical = False
    config.augment.turns = False  # by a random multiple of 90 degrees; images (data.size=(): windows) must be square
    config.augment.rotate = 0.0  # degrees, uniform in +-
    config.augment.scale = 0.0  # zoom, uniform in 1 +-
    config.augment.shift = 0.0  # share of each side, uniform in +-; not of windows, which lie anywhere (data.size=())
    config.augment.elastic = 0.0  # pixels: standard deviation of the displacements
    config.augment.elastic_grid = 3  # elastic: lattice points a side
    config.augment.interpolation = "bilinear"  # of images that are rotated, scaled, shifted or deformed: or cubic
    config.augment.crop = ()  # (height, width) of a random window to predict; () trains on the whole image
    config.augment.brightness = 0.0  # added, uniform in +- of the full range
    config.augment.contrast = 0.0  # factor about the mean, uniform in 1 +-
    config.augment.gamma = 0.0  # exponent, uniform in 1 +-
    config.augment.hue = 0.0  # rotation of the colours, uniform in +- that share of a turn; only for 3 channels
    config.augment.saturation = 0.0  # factor on the difference from grey, uniform in 1 +-; only for 3 channels
    config.augment.blur = 0.0  # pixels: standard deviation of a Gaussian, uniform in 0 to blur
    config.augment.noise = 0.0  # standard deviation of Gaussian noise, uniform in 0 to noise of the full range
    config.augment.cutmix = 0.0  # share of the examples into which a rectangle of another one is pasted

    config.loss = ConfigDict()
    config.loss.cross_entropy = 1.0  # weight of the softmax or sigmoid cross-entropy
    config.loss.cross_entropy_smoothing = 0.0  # label smoothing: the share of the target spread over all classes
    config.loss.focal = 0.0  # weight of the focal loss
    config.loss.focal_gamma = 2.0  # 0 is cross-entropy; more attends to the hard pixels
    config.loss.dice = 0.0  # weight of the soft Dice loss, of each image and class
    config.loss.batch_dice = 0.0  # of the same over the pixels of the whole batch, for classes that few images have
    config.loss.generalized_dice = 0.0  # generalised Dice: classes weigh by their area to the power of -2
    config.loss.tversky = 0.0  # of the Tversky loss
    config.loss.tversky_alpha = 0.3  # of false positives
    config.loss.tversky_beta = 0.7  # of false negatives
    config.loss.tversky_gamma = 1.0  # exponent; 0.75 is the focal Tversky loss of its authors
    config.loss.lovasz = 0.0  # of the Lovasz softmax or hinge: a surrogate of IoU
    config.loss.cldice = 0.0  # of the centreline Dice, binary or multilabel: whether thin structures are connected
    config.loss.cldice_iterations = 10  # at least half the width of the thickest structure in pixels
    # Of cross-entropy and focal loss (not of areas): () is 1 for all | one per class | ("balanced",): inverse to the
    # pixels that each class has in the training images | ("sqrt",): the square roots of those
    config.loss.class_weights = ()
    config.loss.border_weight = 0.0  # w0 of the paper's weight map, which also balances the classes; 0 is off
    config.loss.border_sigma = 5.0  # pixels; how wide a gap between cells is still a border

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # adam | adamw | sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.encoder_learning_rate = 1.0  # encoder_unet: factor on it for the weights of the encoder
    config.optimizer.schedule = "cosine"  # constant | step | cosine
    # When a run is extended: restart: as at its beginning, over the epochs added | constant: as it was at the end, for
    # cosine a tenth of the learning rate
    config.optimizer.extension = "restart"
    config.optimizer.warmup_epochs = 0.0  # linear, from 0
    config.optimizer.decay_epochs = ()  # schedule=step: times 0.1 at each
    config.optimizer.momentum = 0.9  # sgd
    config.optimizer.weight_decay = 0.0  # adamw
    config.optimizer.decayed = "all"  # adamw, which weights: all | kernels (no biases, no scales of normalisation)
    config.optimizer.clip_norm = 0.0  # of the whole gradient; 0 is off
    config.optimizer.frozen = ()  # prefixes of weights that stay fixed, as ("down_0",); batch norm averages still move
    config.optimizer.ema = 0.0  # decay of the EMA weights, which are then the ones evaluated; 0 is off
    config.optimizer.ema_statistics = False  # whether the averages of batch normalisation get an EMA as well

    config.train = ConfigDict()
    config.train.batch_size = 16  # over all devices
    config.train.accumulate = 1  # microbatches in which a batch goes through the network, to save memory
    config.train.nonfinite = "stop"  # a loss, gradient or weight that is not finite: stop | skip (10 in a row at most)
    config.train.epochs = 10.0  # more than before extends the run of a work directory
    config.train.extends = ()  # the epochs at which it ended before, filled in when it is extended
    config.train.minutes = 0.0  # instead of epochs: about how long the training takes, measured on its first steps
    config.train.patience = 0  # evaluations without a better config.eval.best_metric, after which it ends; 0 is off
    config.train.eval_every_epochs = 1.0  # evaluates, draws panels and saves; once more at the end; 0: about ten times
    config.train.checkpoint_every_epochs = 1.0  # saves in between; the most that a crash can cost; 0: likewise
    config.train.log_every_steps = 20
    config.train.panels = 4  # validation images drawn at each evaluation

    config.eval = ConfigDict()
    config.eval.best_metric = "miou"  # picks the best checkpoint: a key of metrics.jsonl without val/, as iou/road
    config.eval.em_scores = False  # two classes: V_rand, V_info and pixel error of the ISBI 2012 challenge as well
    # Views averaged by --mode=eval, report and predict, never while it trains: auto (those that training drew, the best
    # choice) | none | horizontal | vertical | flips | turns | dihedral | rotations; see VIEWS of inference/forward.py
    config.eval.tta = "none"

    config.mesh = ConfigDict()
    config.mesh.data = 0  # devices that share the batch; 0: all devices divided by space
    config.mesh.space = 1  # devices that share the height of each image; 0: all devices divided by data
    config.mesh.shard_optimizer = False  # whether data devices share optimizer state and EMA weights

    return config.lock()
