"""Published methods, one short file each; a new one is its file and a line here."""

from collections.abc import Mapping

from rlvr_fast import options as option_parsing
from rlvr_fast.methods.ace import ACE
from rlvr_fast.methods.base import Method
from rlvr_fast.methods.bnpo import BNPO
from rlvr_fast.methods.canon import CANON
from rlvr_fast.methods.cispo import CISPO
from rlvr_fast.methods.clip_cov import ClipCov
from rlvr_fast.methods.dapo import DAPO
from rlvr_fast.methods.dcpo import DCPO
from rlvr_fast.methods.dhpo import DHPO
from rlvr_fast.methods.dppo_tv import DPPO
from rlvr_fast.methods.dr_grpo import DrGRPO
from rlvr_fast.methods.dsdr import DSDR
from rlvr_fast.methods.etr import ETR
from rlvr_fast.methods.gmpo import GMPO
from rlvr_fast.methods.gpg import GPG
from rlvr_fast.methods.grpo import GRPO
from rlvr_fast.methods.gspo import GSPO
from rlvr_fast.methods.gspo_token import GSPOToken
from rlvr_fast.methods.high_entropy import HighEntropy
from rlvr_fast.methods.kl_cov import KLCov
from rlvr_fast.methods.lp_reg import LpReg
from rlvr_fast.methods.luspo import LUSPO
from rlvr_fast.methods.maxrl import MaxRL
from rlvr_fast.methods.mssr import MSSR
from rlvr_fast.methods.noisy_verifier import NoisyVerifier
from rlvr_fast.methods.nsr import NSR
from rlvr_fast.methods.opo import OPO
from rlvr_fast.methods.pacs import PACS
from rlvr_fast.methods.ppo import PPO
from rlvr_fast.methods.progrpo import ProGRPO
from rlvr_fast.methods.rapo import RAPO
from rlvr_fast.methods.reinforce import Reinforce
from rlvr_fast.methods.reinforce_pp import ReinforcePP
from rlvr_fast.methods.rl_plus import RLPlus
from rlvr_fast.methods.rloo import RLOO
from rlvr_fast.methods.rover import ROVER
from rlvr_fast.methods.sapo import SAPO
from rlvr_fast.methods.ssb import SSB
from rlvr_fast.methods.verl_rank import VerlRank
from rlvr_fast.methods.vespo import VESPO
from rlvr_fast.methods.wgrpo import WGRPO

METHODS: dict[str, type[Method]] = {
    "ace": ACE,
    "bnpo": BNPO,
    "canon": CANON,
    "cispo": CISPO,
    "clip_cov": ClipCov,
    "dapo": DAPO,
    "dcpo": DCPO,
    "dhpo": DHPO,
    "dppo_tv": DPPO,
    "dr_grpo": DrGRPO,
    "dsdr": DSDR,
    "etr": ETR,
    "gmpo": GMPO,
    "gpg": GPG,
    "grpo": GRPO,
    "gspo": GSPO,
    "gspo_token": GSPOToken,
    "high_entropy": HighEntropy,
    "kl_cov": KLCov,
    "lp_reg": LpReg,
    "luspo": LUSPO,
    "maxrl": MaxRL,
    "mssr": MSSR,
    "noisy_verifier": NoisyVerifier,
    "nsr": NSR,
    "opo": OPO,
    "pacs": PACS,
    "ppo": PPO,
    "progrpo": ProGRPO,
    "rapo": RAPO,
    "reinforce": Reinforce,
    "reinforce_pp": ReinforcePP,
    "rl_plus": RLPlus,
    "rloo": RLOO,
    "rover": ROVER,
    "sapo": SAPO,
    "ssb": SSB,
    "verl_rank": VerlRank,
    "vespo": VESPO,
    "wgrpo": WGRPO,
}


def method(name: str, options: Mapping[str, object]) -> Method:
    """The method of that name; option values as in a config or as text.

    Raises:
        ValueError: for an unknown name or option (with the nearest that exists), or its value.
    """
    option_parsing.check_known("method", name, METHODS)
    return option_parsing.build(f"option of method {name}", METHODS[name], options)
