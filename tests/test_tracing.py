"""Traced objectives in Triton against the same objectives run eagerly and differentiated."""

import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rlvr_fast import objectives as losses
from rlvr_fast.kernels import pointwise
from rlvr_fast.kernels.policy_loss import load_all
from rlvr_fast.tracing.objective import Objective
from rlvr_fast.tracing.tokens import TokenFields, Tokens
from rlvr_fast.tracing.trace import trace
from rlvr_fast.tracing.triton_source import _write_once, device_function

nan, inf = float("nan"), float("inf")
NUM_TOKENS = 256
SHIPPED = [
    losses.PolicyGradient(),
    losses.ClippedSurrogate(),
    losses.ClippedSurrogate(clip_low=0.0, clip_high=0.0, dual_clip=1.0),
    losses.ClippedSurrogate(clip_high=0.28, dual_clip=3.0),
    losses.DynamicClipSurrogate(),
    losses.CappedWeight(),
    losses.CappedWeight(cap=1.0),
    losses.KL1(),
    losses.KL2(),
    losses.KL3(coef=0.5),
    losses.EntropyBonus(coef=0.3),
    losses.DynamicClipSurrogate() + losses.KL3(coef=0.04) + losses.EntropyBonus(coef=0.01),
]


@dataclass(frozen=True, kw_only=True)
class Zoo(Objective):
    """Most of the table, an extra, an in-place op, a tensor constant and nested floats."""

    powers: tuple[float, float] = (0.5, 0.25)
    rank: int = 3

    def token_loss(self, t: Tokens) -> Tensor:
        x, temperature = t.logp - t.rollout_logp, t.extras["temperature"]
        smooth = F.silu(x) * F.softplus(x) - F.logsigmoid(x) + torch.tanh(x) ** 2
        roots = torch.sqrt(x**2 + self.powers[0]) + torch.rsqrt(1 + x.abs()) ** self.rank
        exact = torch.expm1(x / 50) + torch.log1p(x * x) + F.relu(x) / (2 + x.abs())
        signs = torch.sign(t.advantage) * torch.erf(x) + (x > 0).float() * self.powers[1]
        odd = torch.isnan(x) | ~(x < 5) & (x != 7)
        signs.mul_(torch.tensor(1.5))
        return torch.where(odd, smooth, roots + exact * temperature) + signs - 0.1 * t.entropy**2


@dataclass(frozen=True, kw_only=True)
class Branching(Objective):
    margin: float

    def token_loss(self, t: Tokens) -> Tensor:
        return -t.logp * self.margin if self.margin > 0 else t.logp**2 + max(self.margin, -1.0)


@triton.jit
def probe_kernel(tokens_ptr, field_ptrs, scalars, out_ptr, N: tl.constexpr, FN: tl.constexpr):
    i = tl.arange(0, N)
    logp, entropy, old, advantage = load_all(
        (tokens_ptr, tokens_ptr + N, tokens_ptr + 2 * N, tokens_ptr + 3 * N), i
    )
    loss, dlogp, dentropy = FN(logp, entropy, old, advantage, load_all(field_ptrs, i), scalars)
    tl.store(out_ptr + i, loss)
    tl.store(out_ptr + N + i, dlogp)
    tl.store(out_ptr + 2 * N + i, dentropy)


@pytest.fixture(autouse=True)
def _no_files_at_home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "objectives"))


def tokens() -> tuple[Tensor, Tensor, TokenFields]:
    """Random ones, then extreme ratios, zero advantages, ties, masked garbage."""
    logp = -torch.rand(NUM_TOKENS) * 3
    old = logp + torch.randn(NUM_TOKENS) * 0.4
    old[64:96] = logp[64:96] + torch.tensor([60.0, -60.0]).repeat(16)
    old[96:128] = logp[96:128]
    advantage = torch.randn(NUM_TOKENS)
    advantage[128:160] = 0
    weight = torch.rand(NUM_TOKENS) + 0.1
    weight[160:192] = 0
    fields = TokenFields(
        weight=weight,
        old_logp=old,
        ref_logp=old.flip(0),
        rollout_logp=old.roll(7),
        advantage=advantage,
        extras={"temperature": torch.rand(NUM_TOKENS), "unread": torch.full_like(logp, nan)},
    )
    for garbage in (fields.old_logp, fields.ref_logp, fields.advantage):
        garbage[160:192] = torch.tensor([nan, inf, -inf, 1e30]).repeat(8)
    return logp, torch.rand(NUM_TOKENS), fields


def eager(objective: Objective, logp: Tensor, entropy: Tensor, fields: TokenFields) -> Tensor:
    logp, entropy = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    loss = objective.token_loss(Tokens(logp, entropy, fields))
    gradients = torch.autograd.grad(
        loss.sum(), (logp, entropy), allow_unused=True, materialize_grads=True
    )
    return torch.stack([loss.detach(), *gradients])


def in_triton(objective: Objective, logp: Tensor, entropy: Tensor, fields: TokenFields) -> Tensor:
    traced = trace(objective)
    others = [getattr(fields, name) for name in traced.other_fields]
    others += [fields.extras[name] for name in traced.extras]
    out = torch.empty(3, NUM_TOKENS)
    probe_kernel[(1,)](
        torch.stack([logp, entropy, fields.old_logp, fields.advantage]),
        (fields.weight, *others),
        traced.scalars(objective) or (0.0,),
        out,
        N=NUM_TOKENS,
        FN=device_function(traced.source),
    )
    return out


@pytest.mark.parametrize(
    "objective", [*SHIPPED, Zoo(), Branching(margin=0.5), Branching(margin=-0.5)], ids=repr
)
def test_loss_and_gradients_are_those_of_the_eager_objective(objective):
    case = tokens()
    ours, torchs = in_triton(objective, *case), eager(objective, *case)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("objective", [*SHIPPED, Zoo()], ids=repr)
def test_other_floats_need_no_other_program(objective):
    other = with_floats(objective, 0.625)
    assert other != objective or not trace(objective).scalars(objective)
    assert trace(other) is trace(objective)
    assert set(trace(other).scalars(other)) <= {0.625}


def with_floats(value: object, x: float) -> object:
    if isinstance(value, float):
        return x
    if isinstance(value, tuple):
        return tuple(with_floats(part, x) for part in value)
    if isinstance(value, Objective):
        fields = {name: with_floats(part, x) for name, part in vars(value).items()}
        return type(value)(**fields)
    return value


def test_scalars_come_in_the_order_of_the_fields():
    total = losses.ClippedSurrogate(clip_low=0.1, clip_high=0.3) + losses.KL3(coef=0.7)
    assert trace(total).scalars(total) == (0.1, 0.3, 0.7)


def test_what_is_not_a_float_is_structure():
    assert trace(Zoo(rank=2)).key != trace(Zoo(rank=3)).key
    plain, dual = losses.ClippedSurrogate(), losses.ClippedSurrogate(dual_clip=3.0)
    assert trace(plain).key != trace(dual).key


def test_a_trace_names_what_it_reads():
    total = losses.ClippedSurrogate() + losses.KL2() + losses.EntropyBonus()
    assert trace(total).reads == ("old_logp", "advantage", "ref_logp")
    assert trace(Zoo()).extras == ("temperature",)
    assert trace(total).reads_entropy
    assert not trace(losses.ClippedSurrogate()).reads_entropy


def test_a_float_that_python_branches_on_becomes_a_literal():
    up, down = trace(Branching(margin=0.5)), trace(Branching(margin=-0.5))
    assert up.literal
    assert up.key != down.key
    assert up.scalars(Branching(margin=0.5)) == ()


@dataclass(frozen=True, kw_only=True)
class Typed(Objective):
    strength: object = 2.0

    def token_loss(self, t: Tokens) -> Tensor:
        return -t.logp * (self.strength if isinstance(self.strength, float) else 0.0)


def test_a_float_that_python_asks_the_type_of_becomes_a_literal():
    assert trace(Typed()).literal
    case = tokens()
    torch.testing.assert_close(in_triton(Typed(), *case), eager(Typed(), *case))


def objective_of(body) -> Objective:
    return type("Own", (Objective,), {"token_loss": lambda self, t: body(t)})()


@pytest.mark.parametrize(
    "body",
    [
        lambda t: -t.logp / t.logp.numel(),
        lambda t: -t.logp * t.advantage.mean(),
        lambda t: -t.logp.cumsum(0),
        lambda t: -t.logp.flip(0),
        lambda t: -t.logp * torch.rand_like(t.logp),
        lambda t: -t.logp if (t.advantage > 0).any() else t.logp,
        lambda t: -t.logp * t.seq_mean(t.logp),
        lambda t: -t.logp * t.group_mean(t.logp),
        lambda t: -t.logp * t.extras.get("x", 1.0),
        lambda t: -t.logp * ("x" in t.extras),
        lambda t: -t.logp.double() * t.advantage,
        lambda t: (-t.logp.double()).float(),
        lambda t: -t.logp.half().float(),
        lambda t: -t.logp * torch.tensor([1.0, 2.0, 3.0]),
        lambda t: -t.logp.sum(),
        lambda t: torch.div(t.logp, 2, rounding_mode="floor"),
    ],
    ids=lambda body: str(body.__code__.co_firstlineno),
)
def test_what_is_not_pointwise_is_left_to_torch(body):
    assert trace(objective_of(body)) is None


def test_a_sequence_level_objective_is_left_to_torch():
    assert trace(losses.SequenceClippedSurrogate()) is None
    assert trace(losses.ClippedSurrogate() + losses.SequenceClippedSurrogate()) is None


def test_a_mistake_of_the_author_is_raised_as_it_is():
    with pytest.raises(AttributeError, match="no attribute 'log_p'"):
        trace(objective_of(lambda t: -t.log_p))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_tracing_works_where_gradients_are_off(context):
    with context():
        traced = trace(objective_of(lambda t: -t.logp * t.advantage + t.entropy**2))
    assert traced.reads_entropy


def test_constants_may_have_the_shape_of_the_tokens():
    def body(t):
        ones = torch.ones(t.logp.shape) + t.logp.new_zeros(t.logp.shape)
        return ones * t.logp - torch.full((len(t.logp),), 2.0) * t.entropy

    case = tokens()
    own = objective_of(body)
    torch.testing.assert_close(in_triton(own, *case), eager(own, *case))


def test_a_constant_loss_has_no_gradient():
    flat = objective_of(lambda t: t.advantage * 2 + 1)
    assert not in_triton(flat, *tokens())[1:].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, on purpose
def test_nan_spreads_as_in_torch():
    bad = torch.tensor([nan, 1.0, inf, -inf]).repeat(64)

    def body(t):
        x, y = t.extras["x"], t.extras["y"]
        return (
            torch.minimum(x, y).clamp(-3.0, 3.0)
            + torch.maximum(x, y).clamp(min=y)
            + torch.where(torch.isnan(x), 1.0, torch.sign(x))
            + F.relu(y) * t.logp
        )

    logp, entropy, fields = tokens()
    extras = {"x": bad, "y": bad.reshape(64, 4).T.reshape(-1)}
    fields = TokenFields(weight=torch.ones(NUM_TOKENS), old_logp=logp, advantage=logp,
                         extras=extras)  # fmt: skip
    own = objective_of(body)
    ours, torchs = (f(own, logp, entropy, fields) for f in (in_triton, eager))
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0, equal_nan=True)


@triton.jit
def pointwise_kernel(x_ptr, out_ptr, N: tl.constexpr, FN: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, FN(tl.load(x_ptr + i)))


@pytest.mark.parametrize("name", ["log1p", "expm1", "tanh", "sigmoid"])
def test_pointwise_functions_are_exact_to_a_few_eps(name):
    size = torch.logspace(-30, 1.9, 1024, base=10)
    x = size if name == "log1p" else torch.cat([size, -size])
    out = torch.empty_like(x)
    pointwise_kernel[(1,)](x, out, N=len(x), FN=getattr(pointwise, name))
    exact = getattr(torch, name)(x.double())
    torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=1e-38)


def test_the_cache_is_private_and_repairs_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("RLVR_FAST_CACHE", str(tmp_path / "new" / "cache"))
    source = trace(losses.PolicyGradient()).source + "\n"
    device_function(source)
    (path,) = (tmp_path / "new" / "cache").glob("*.py")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("cut off")
    device_function.cache_clear()
    assert device_function(source).__name__ == "objective"
    assert path.read_text() == source


def test_many_may_write_the_same_file_at_once(tmp_path):
    texts = {f"objective_{i}.py": f"{i}" * 1000 for i in range(100)}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(lambda: [_write_once(tmp_path / k, v) for k, v in texts.items()])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == texts
