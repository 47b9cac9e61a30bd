"""Draw validation_results.json; needs neither torch nor any image.

OUTPUT holds the study's metrics, AP by object size, accuracy against speed, and the cost of each kind of error. Beside
it, under its name with a suffix: precision_recall, per_class, confusion, calibration, and training, of the runs whose
folder still exists.

  python plot_results.py --results a.json --output a.png
"""

from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.cli import flag
from common.console import InputError
from common.evaluate.results import read_results
from common.files import atomic_write, check_outputs
from common.show import charts


@dataclass(frozen=True)
class Settings:
    results: str = flag("validation_results.json", "the file that comprehensive_validation.py wrote")
    output: str = flag("model_comparison_charts.png", "the chart to write, and the first part of the others' names")


def main(settings: Settings) -> Path:
    """Write the charts and return the path of the first."""
    output = Path(settings.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"--output {output}: charts are PNG files; give a name that ends in .png")
    paths = {name: output.with_stem(f"{output.stem}_{name}") for name in charts.CHARTS} | {"comparison": output}
    check_outputs(paths.values(), [settings.results])
    pages = charts.render(read_results(settings.results), dpi=130)
    for name in paths.keys() - pages.keys():
        paths[name].unlink(missing_ok=True)  # of an earlier run
    for name, page in pages.items():
        with atomic_write(paths[name]) as file:
            file.write(page)
        print(f"written to {paths[name]}")
    return output


if __name__ == "__main__":
    cli.run(main, Settings, __doc__)
