"""Numbers -> what people look at. Sets up matplotlib, which reads its environment when it is first imported."""

import os
from pathlib import Path

# A notebook passes its backend on to the scripts that it starts; where its package is not installed for them, even the
# import of matplotlib fails. Without a home folder, matplotlib warns at every start unless a folder is given to it.
os.environ["MPLBACKEND"] = "agg"
if os.environ.get("DETECTION_CACHE"):
    os.environ.setdefault("MPLCONFIGDIR", str(Path(os.environ["DETECTION_CACHE"], "matplotlib")))
