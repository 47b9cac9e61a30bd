"""Draw the comparison from validation_results.json; needs neither torch nor any image.

OUTPUT holds the study's six metrics with their intervals, AP by object size, accuracy against speed, and the cost of
each kind of error. Beside it, under its name with a suffix: precision_recall, per_class, confusion, calibration, and
training, the last from the log.jsonl of the runs that still exist. Works with one model or many; a model that could not
be evaluated is named below the charts with its reason.

  python plot_results.py                    validation_results.json -> model_comparison_charts.png and the others
  python plot_results.py --results a.json --output a.png
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common import cli
from common.cli import flag
from common.console import InputError
from common.evaluate.results import read_results
from common.files import atomic_write, check_outputs
from common.show import charts

DPI = 130


@dataclass(frozen=True)
class Settings:
    results: str = flag("validation_results.json", "the file that comprehensive_validation.py wrote")
    output: str = flag("model_comparison_charts.png", "the chart to write, and the first part of the others' names")


def main(settings: Settings) -> Path:
    """Write the charts and return the path of the comparison."""
    output = Path(settings.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: charts are PNG files; give a name that ends in .png")
    pages = charts.render(read_results(settings.results), DPI)
    paths = {name: output.with_stem(f"{output.stem}_{name}") for name in pages} | {"comparison": output}
    check_outputs(paths.values(), [settings.results])
    for name, page in pages.items():
        path = paths[name]
        with atomic_write(path) as file:
            file.write(page)
        with Image.open(path) as image:
            print(f"{path}: {image.width} x {image.height} pixels")
    return output


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
