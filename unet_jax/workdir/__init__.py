"""The work directory: a contract between the training and everything after it.

config.json             the configuration of the training
classes.json            task, class names, palette, channels; the normalization of images; the sizes of the training
                        images before they were resized
environment.json        command, versions and devices of the run, and of every resumed one where they differ
metrics.jsonl           one JSON object a line: step, epoch, train/..., val/...
checkpoints/<step>/     see checkpoints.py
panels/<step>/*.png     image, ground truth, prediction and error of a few validation images
history.png             curves
report.html             all of it on one page, for a browser
eval.json               the scores of the last `--mode=eval`
eval/<scored>.json      those of every one: of which images, split, step and test-time augmentation is in the name
eval/<scored>.csv       the same for each image
events.out.tfevents.*   TensorBoard
damaged/<step>/         checkpoints that were found damaged
<name>.damaged          what stood in the way of a file that is only to look at

`schema.py` says what the JSON files may hold. Each checkpoint remembers what `config.json` and `classes.json` were, so
that a later change of what decides over results is noticed.
"""
