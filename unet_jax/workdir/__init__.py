"""The work directory: a contract between the training and everything after it.

config.json             the configuration of the training
classes.json            task, class names, palette, channels; the normalization of images; the size of the first
                        training image before it was resized
environment.json        command, versions and devices of the run, and of every resumed one where they differ
metrics.jsonl           one JSON object a line: step, epoch, train/..., val/...
checkpoints/<step>/     see checkpoints.py
panels/<step>/*.png     image, ground truth, prediction and error of a few validation images
history.png             curves
report.html             all of it on one page, for a browser
eval.json               the scores of the last `--mode=eval`
events.out.tfevents.*   TensorBoard
"""
