"""What the scripts share, in six rooms.

types.py      the types that travel between the rooms: ImageMeta, Targets, Batch, RawOutput, Detections; the letterbox
console.py    how a program talks to its user: errors, progress bars, signals; imports no torch
cli.py        command-line flags from a dataclass of settings, and the exit of every script
files.py      atomic files, the cache folder, no output over an input
hub.py        models on the hub: their names and files
images.py     image files: finding, decoding, EXIF orientation, the letterbox
runtime.py    device, precision, processes, seeds
data/         whatever --data names -> batches
              sources (the table of readers), readers, hub, official, demo | table (what they fill), checks (decoding) |
              memory (the data set), dataset (samples, order, loaders), transforms
model/        the detector and what teaches it
              backbone, img_focus, heads, second_look, detector | boxes (geometry), assignment, losses | postprocess |
              checkpoint, trained (what load_detector returns; the hub)
train/        one training run
              optim (learning rates, schedule, EMA), run (folder, log, state, resuming), feature_cache
evaluate/     detections -> numbers; draws nothing
              detect (running and timing), others (transformers, ultralytics) | detections (the table), overlaps,
              metrics, primary, diagnosis, trust, bootstrap, evaluation (all of them), results (the file)
show/         numbers -> what people look at
              tables, fonts (text that can be drawn), charts, drawing, report
export/       a checkpoint -> files that others run: python -m common.export
              graph (also in 8 bits), runtime (what runs the files)

Imports go one way: scripts -> train, show, export -> evaluate -> data, model -> the files at the root. data and model
do not import each other, nor do train, show and export. tests/test_layout.py holds this, with the one exception.
"""
