"""What a sweep's tables cost while a thousand points finish."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.quickstart import quickstart
from experiments.sweep import Sweep, seeds
from kd_core.files import write_json
from kd_core.training.metrics import MetricLog
from launchers.sweeping import results
from launchers.sweeping.folder import SweepFolder
from launchers.sweeping.points import Point, resolve
from launchers.sweeping.results import Results, write_results
from tests.launchers.command import table
