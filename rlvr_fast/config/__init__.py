"""The configuration of a run: frozen dataclasses, from TOML and the command line."""

from rlvr_fast.config.checks import Precision as Precision
from rlvr_fast.config.evaluation import EvalConfig as EvalConfig
from rlvr_fast.config.files import SHIPPED as SHIPPED
from rlvr_fast.config.files import changes as changes
from rlvr_fast.config.files import describe as describe
from rlvr_fast.config.files import from_values as from_values
from rlvr_fast.config.files import load as load
from rlvr_fast.config.files import to_values as to_values
from rlvr_fast.config.training import FREE_ON_RESUME as FREE_ON_RESUME
from rlvr_fast.config.training import EngineName as EngineName
from rlvr_fast.config.training import KLEstimate as KLEstimate
from rlvr_fast.config.training import Overlong as Overlong
from rlvr_fast.config.training import Schedule as Schedule
from rlvr_fast.config.training import TrainConfig as TrainConfig
