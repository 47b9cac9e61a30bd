"""What the scripts share, in seven rooms; imports go one way, as tests/test_layout.py holds.

types, console, cli, files, hub, images, runtime: what travels between the rooms, and what all of them need
data/       whatever --data names -> batches: sources (the table of readers), readers, hub, official, demo | table (what
            they fill), checks (decoding) | memory (the data set), dataset (samples, order, loaders), transforms
model/      the detector and what teaches it: backbone, img_focus, heads, roi_head, detector | boxes, assignment,
            losses | postprocess | checkpoint, trained (what load_detector returns; the hub)
train/      one training run: optim (learning rates, averages), run (folder, log, state, resuming), feature_cache
evaluate/   detections -> numbers: detect (running and timing), others (transformers, ultralytics) | detections (the
            table), overlaps, metrics, primary, diagnosis, trust, bootstrap, evaluation (all), results (the file)
show/       numbers -> what people look at: tables, fonts, charts, drawing, report
export/     a checkpoint -> files that others run (python -m common.export): graph (also in 8 bits), runtime
predict/    many images -> detections for other tools (python -m common.predict): journal, formats
"""
