"""What the entry-point group `verl.plugins` names: verl imports the module and calls nothing, so
that importing it puts our parts into verl. See `rlvr_fast.integrations.verl`.
"""

from rlvr_fast.integrations.verl import load

load()
