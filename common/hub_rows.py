"""Rows of a hub data set's index -> COCO: what the rows leave open is guessed from all of them, and said."""

import numpy as np

COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,,dining table,,,toilet,,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,,book,clock,vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
COCO_IDS = {name: number for number, name in enumerate(COCO_NAMES, 1) if name}  # official ids, 80 of 1..90


def coco_of_rows(rows: list[dict], names: list[str] | None, box_format: str, source: str) -> dict:
    """The COCO instances dictionary of rows of the index. What is guessed is printed, as of `source`."""
    boxes, in_shares = _boxes(rows, box_format, source)
    categories, id_of = _categories(rows, names, source)
    annotations = []
    for row in rows:
        count = len(row["boxes"])
        areas, crowds = (row[key] if len(row[key]) == count else [None] * count for key in ("areas", "crowds"))
        for category, area, crowd in zip(row["categories"], areas, crowds, strict=True):
            box = boxes[len(annotations)]
            if box and (area is None or in_shares):
                area = box[2] * box[3]
            entry = {"id": len(annotations) + 1, "image_id": row["id"], "category_id": id_of.get(category)}
            annotations.append(entry | {"bbox": box, "area": area, "iscrowd": int(bool(crowd))})
    images = [{key: row[key] for key in ("id", "file_name", "width", "height")} for row in rows]
    return {"images": images, "annotations": annotations, "categories": categories}


def _categories(rows: list[dict], names: list[str] | None, source: str) -> tuple[list[dict], dict]:
    """COCO's `categories`, and the id of each value in the rows. The ids are COCO's own where the names are COCO's."""
    values = range(len(names)) if names else sorted({v for row in rows for v in row["categories"]} - {None})
    if not names and values and isinstance(values[0], int):
        names = [f"class {value}" for value in values]
        print(f"{source}: its categories have numbers and no names: {', '.join(names[:3])}, …", flush=True)
    names = names or [str(value) for value in values]
    ids = [COCO_IDS[name] for name in names] if set(names) == set(COCO_IDS) else range(1, len(names) + 1)
    categories = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    return categories, dict(zip(values, ids, strict=True))


def _boxes(rows: list[dict], box_format: str, source: str) -> tuple[list[list[float] | None], bool]:
    """All boxes as COCO's xywh in pixels, None for what is no box; and whether they came in shares of pictures."""
    listed = [box if _is_box(box) else [np.nan] * 4 for row in rows for box in row["boxes"]]
    boxes = np.array(listed, np.float64).reshape(-1, 4)
    sizes = np.array([(row["width"], row["height"]) for row in rows for _ in row["boxes"]]).reshape(-1, 2)
    real = np.isfinite(boxes).all(1)
    in_shares = bool(real.any()) and boxes[real].max() <= 1 and sizes[real].max() > 2
    if in_shares:
        boxes *= np.tile(sizes, 2)
        print(f"{source}: no box reaches beyond 1; read as shares of their pictures", flush=True)
    fits = {
        "xyxy": ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= sizes + 1)).all(1).sum(),
        "xywh": (boxes[:, :2] + boxes[:, 2:] <= sizes + 1).all(1).sum(),
    }
    if box_format == "auto" and len(boxes):
        box_format, other = sorted(fits, key=fits.get, reverse=True)
        counts = f"{fits[box_format]} of {len(boxes)} fit so, {fits[other]} as {other}"
        print(f"{source}: boxes read as {box_format}: {counts} (--box-format decides)", flush=True)
    if box_format == "xyxy":
        boxes[:, 2:] -= boxes[:, :2]
    return [box if whole else None for box, whole in zip(boxes.tolist(), real, strict=True)], bool(in_shares)


def _is_box(box: object) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box)
