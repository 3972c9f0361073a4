"""The Triton row functions: in Triton's interpreter on a CPU, and the same tests on a GPU where there is one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from fused_cases import (
    DIFFERENTIABLE,
    FULL,
    NAMES,
    TEMPERATURES,
    TRUNCATED,
    Case,
    as_dict,
    assert_close,
    counts,
    gradients,
    in_forward,
    make_case,
    masks,
    normal,
    weighted,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lkspec.losses.divergences import LOG_ZERO, logit_stats
from lkspec.losses.fused import token_stats as fused_linear
from lkspec.losses.fused import torch_rows
from lkspec.losses.fused.logits import Logits, Scratch
from lkspec.losses.objectives import LKAlpha, LKLambda, Objective, jensen_shannon, reduce_loss
from lkspec.losses.target_filter import TargetFilter
from lkspec.types import HeadSummary, LinearHead, TokenStats
from lkspec.vocab import DraftVocab

#: numpy's, of the infinities that the kernels allow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install triton")


class Place(NamedTuple):
    """Where the kernels run."""

    rows: ModuleType
    device: str


@pytest.fixture(
    scope="module", params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def place(request: pytest.FixtureRequest) -> Place:
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # conftest.py decides, before triton is imported
    if request.param == "cuda" and (interpreted or not torch.cuda.is_available()):
        pytest.skip("no GPU, or TRITON_INTERPRET=1")
    if request.param == "cpu" and not interpreted:
        pytest.skip("a GPU is here: the same tests run on it")
    return Place(importlib.import_module("lkspec.losses.fused.triton_rows"), request.param)


@pytest.fixture
def chosen(place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """``token_stats`` runs on the Triton functions, whatever the device."""
    monkeypatch.setattr(fused_linear, "row_functions", lambda chunks, device: place.rows)
    return place


# The row functions themselves, against the definition in float64.


class Rows(NamedTuple):
    """Logits of some rows, and what they are measured against."""

    draft: Tensor
    target: Tensor
    tokens: Tensor
    vocab: DraftVocab
    temperature: float | Tensor
    top_k: int


def make_rows(
    vocab: DraftVocab,
    num_rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float | Tensor = 1.0,
    scale: float = 2.0,
    holes: bool = False,
    top_k: int = 0,
) -> Rows:
    """Normal logits; with holes, a third of the target's are -inf, and every third row has no mass in the vocabulary
    (a full one always has some: there it is on the first token alone).
    """
    target = scale * normal(num_rows, vocab.target_size, seed=1)
    if holes:
        target[:, 1::3] = -torch.inf
        inside = vocab.ids[1:] if vocab.is_full else vocab.ids
        target[::3, inside] = -torch.inf
        # A small vocabulary may have lost all its tokens so, and no target is like that.
        target[target.isneginf().all(1), vocab.t2d.logical_not().int().argmax()] = 0.0
    tokens = torch.randint(0, vocab.target_size, (num_rows,), generator=torch.Generator().manual_seed(2))
    draft = scale * normal(num_rows, vocab.size, seed=3)
    return Rows(draft.to(dtype), target.to(dtype), tokens, vocab, temperature, top_k)


def expected(rows: Rows, slopes: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics, and the gradient of their sum weighted by the slopes, in float64."""
    leaf = rows.draft.double().requires_grad_()
    options = {"temperature": rows.temperature, "top_k": rows.top_k}
    stats = logit_stats(leaf, rows.target.double(), rows.tokens, rows.vocab, **options)
    loss = sum((stats[name] * slope).sum() for name, slope in slopes.items())
    return {name: value.detach() for name, value in stats.items()}, torch.autograd.grad(loss, leaf)[0]


def computed(
    place: Place, rows: Rows, slopes: dict[str, Tensor], *, lanes: int, in_one: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """The same from the kernels; ``in_one`` as backward asks for slopes, without what ``row_stats`` found."""
    device, kernels = torch.device(place.device), place.rows
    vocab, tile = DraftVocab(rows.vocab.ids, rows.vocab.target_size).to(device), kernels.Tile(8, lanes, 1)
    head = LinearHead(torch.empty(0, 0))
    temperature = rows.temperature.to(device) if isinstance(rows.temperature, Tensor) else rows.temperature
    draft, target_logits = (Logits(x.clone().to(device), head, temperature) for x in (rows.draft, rows.target))
    scratch = Scratch(device, torch.float32)
    target = kernels.read_target(target_logits, vocab, TargetFilter(rows.top_k), scratch, tile=tile)
    stats = kernels.row_stats(draft, target, rows.tokens.to(device), vocab, scratch, tile=tile)
    untouched = torch.equal(draft.product.cpu().nan_to_num(), rows.draft.nan_to_num())
    assert untouched, "statistics leave the logits as they are"
    slopes = {name: slope.float().to(device) for name, slope in slopes.items()}
    if in_one:
        columns = Logits(vocab.restrict(target_logits.product).clone(), head, temperature)
        if not rows.top_k:
            target = kernels.read_target_columns(columns, target.log_coverage, scratch, tile=tile)
        kernels.d_logits(draft, target, dict(stats), slopes, scratch, tile=tile)
    else:
        kernels.d_logits(draft, target, stats, slopes, scratch, tile=tile)
    return {name: value.cpu() for name, value in stats.items()}, draft.product.cpu()


def random_slopes(num_rows: int, names: tuple[str, ...] = DIFFERENTIABLE) -> dict[str, Tensor]:
    return {name: normal(num_rows, seed=50 + i, dtype=torch.float64) for i, name in enumerate(names)}


def assert_rows_equal(place: Place, rows: Rows, *, lanes: int = 2, in_one: bool = False, tolerance: float = 1e-5):
    slopes = random_slopes(len(rows.tokens))
    stats, d_draft = computed(place, rows, slopes, lanes=lanes, in_one=in_one)
    truth, d_truth = expected(rows, slopes)
    assert set(stats) == set(NAMES)
    for name in NAMES:
        assert torch.allclose(stats[name].double(), truth[name], rtol=1e-5, atol=tolerance), name
    # A gradient is as coarse as the logits that it replaces; a vocabulary of one token has none.
    accuracy = 1e-5 if rows.draft.dtype == torch.float32 else 8e-3
    assert d_draft.isfinite().all()
    assert (d_draft.double() - d_truth).norm() <= accuracy * d_truth.norm() + 1e-6


VOCABULARIES = {"full": DraftVocab.full(37), "truncated": DraftVocab(torch.arange(0, 74, 2), 101)}
both_vocabularies = pytest.mark.parametrize("vocab", VOCABULARIES.values(), ids=VOCABULARIES.keys())


@pytest.mark.parametrize("in_one", [False, True], ids=["after_row_stats", "in_one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@both_vocabularies
def test_rows_equal_float64(place: Place, vocab: DraftVocab, dtype: torch.dtype, in_one: bool):
    """Three tiles a row, the last one ragged; two programs, the last one ragged. One temperature, or one a row."""
    temperature = 0.7 if dtype == torch.bfloat16 else torch.linspace(0.5, 1.5, 11)
    assert_rows_equal(place, make_rows(vocab, 11, dtype=dtype, temperature=temperature, holes=True), in_one=in_one)


@pytest.mark.slow
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(place: Place, data: st.DataObject):
    target_size = data.draw(st.integers(1, 60), label="V")
    ids = data.draw(st.sets(st.integers(0, target_size - 1), min_size=1), label="ids")
    rows = make_rows(
        DraftVocab(torch.tensor(sorted(ids)), target_size),
        data.draw(st.integers(1, 10), label="R"),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        temperature=data.draw(st.sampled_from([0.5, 1.0, 1.6])),
        holes=data.draw(st.booleans()),
    )
    assert_rows_equal(place, rows, lanes=data.draw(st.sampled_from([1, 2, 4])), in_one=data.draw(st.booleans()))


@both_vocabularies
def test_a_filtered_target(place: Place, vocab: DraftVocab):
    assert_rows_equal(place, make_rows(vocab, 5, temperature=0.8, top_k=9))


@pytest.mark.parametrize("in_one", [False, True], ids=["after_row_stats", "in_one"])
def test_probabilities_that_underflow(place: Place, in_one: bool):
    """alpha down to e^-300: beside rows of ordinary alpha, which the same program holds."""
    rows = make_rows(VOCABULARIES["full"], 6)
    gaps = torch.tensor([0.0, 30.0, 50.0, 100.0, 200.0, 300.0])
    target, draft = rows.target.clone(), rows.draft.clone()
    target[:, 5], draft[:, 20] = gaps, gaps
    assert_rows_equal(place, rows._replace(target=target, draft=draft), in_one=in_one, tolerance=1e-4)


def test_rows_without_target_mass(place: Place):
    rows = make_rows(VOCABULARIES["truncated"], 4, holes=True)
    stats, d_draft = computed(place, rows, random_slopes(4), lanes=2, in_one=False)
    for row in (0, 3):
        assert stats["log_alpha"][row] == LOG_ZERO
        assert stats["kl"][row] == stats["reverse_kl"][row] == stats["coverage"][row] == 0
        assert not d_draft[row].any()


@pytest.mark.parametrize("side", ["draft", "target"])
def test_nan_stays_nan(place: Place, side: str):
    rows = make_rows(VOCABULARIES["truncated"], 3)
    logits = getattr(rows, side).clone()
    logits[1, 20] = torch.nan
    stats, d_draft = computed(place, rows._replace(**{side: logits}), random_slopes(3), lanes=2, in_one=False)
    for name in DIFFERENTIABLE:
        assert stats[name].isnan().tolist() == [False, True, False], name
    assert d_draft.isnan().any(1).tolist() == [False, True, False]


def test_equal_distributions_tie_towards_p(place: Place):
    """Where q = p everywhere, M_v = [q_v < p_v] is 0, alpha is 1 and nothing pulls; also far from zero."""
    rows = make_rows(VOCABULARIES["full"], 3)
    rows = rows._replace(draft=rows.draft + 500.0, target=rows.draft + 500.0)
    slopes = {"log_alpha": torch.ones(3)}
    stats, d_draft = computed(place, rows, slopes, lanes=2, in_one=False)
    assert torch.allclose(stats["log_alpha"], torch.zeros(3), atol=1e-6)
    assert torch.allclose(stats["kl"], torch.zeros(3), atol=1e-6)
    assert not d_draft.any()


def test_the_first_of_equal_logits_is_proposed(place: Place):
    """As torch.argmax has it, wherever in a row of several tiles they stand; so does the target."""
    rows = make_rows(VOCABULARIES["full"], 36)
    draft = rows.draft.clamp(max=3.0)
    for row in range(36):
        draft[row, row:] = draft[row, row:].index_fill(0, torch.arange(0, 37 - row, 5), 4.0)
    rows = rows._replace(draft=draft, target=draft, tokens=torch.arange(36))
    stats, _ = computed(place, rows, {"kl": torch.ones(36)}, lanes=1, in_one=False)
    assert stats["hit"].all()
    assert stats["top1"].all()


def test_equal_inputs_give_equal_bits(place: Place):
    rows = make_rows(VOCABULARIES["truncated"], 9, dtype=torch.bfloat16)
    (one, d_one), (two, d_two) = (computed(place, rows, random_slopes(9), lanes=2, in_one=False) for _ in range(2))
    assert torch.equal(d_one, d_two)
    for name in NAMES:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("width", [1, 8, 37, 300, 32_000, 151_936])
def test_default_tiles_are_powers_of_two(place: Place, width: int):
    tile = place.rows.default_tile(width)
    for size in tile:
        assert size & (size - 1) == 0
    assert tile.rows * tile.lanes >= 32 * tile.num_warps


# All of token_stats through them.


def moved(case: Case, device: str) -> Case:
    """The same leaves on another device: gradients still reach the first one's."""
    heads = {id(head): head.to(device) for head in case.heads}
    return replace(
        case,
        hidden=case.hidden.to(device),
        heads=[heads[id(head)] for head in case.heads],
        target_hidden=case.target_hidden.to(device),
        target_head=case.target_head.to(device),
        vocab=DraftVocab(case.vocab.ids, case.vocab.target_size).to(device),
        tokens=case.tokens.to(device),
        mask=case.mask.to(device),
    )


def fused(place: Place, case: Case, **options: Any) -> dict[str, Tensor]:
    stats = moved(case, place.device).fused(**options)
    names = NAMES if stats.row_value is None else (*NAMES, "row_value")
    return {name: value.cpu() for name, value in as_dict(stats, names).items()}


def assert_equals_reference(place: Place, case: Case, *, summary: HeadSummary | None = None, **options: Any) -> None:
    ours = fused(place, case, target_summary=None if summary is None else summary.to(place.device), **options)
    theirs = as_dict(case.reference(**options))
    for name in NAMES:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-5), name
        assert not ours[name][~case.mask].any(), name
        assert ours[name].requires_grad == (name in DIFFERENTIABLE), name
    for one, two in zip(gradients(case, weighted(ours)), gradients(case, weighted(theirs)), strict=True):
        assert_close(one, two, 1e-5)


@pytest.mark.parametrize("temperature", [0.7, TEMPERATURES], ids=["0.7", "by_row"])
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
@pytest.mark.parametrize("vocab", [TRUNCATED, FULL], ids=["truncated", "full"])
def test_recomputed_gradients_equal_reference(
    chosen: Place, vocab: DraftVocab, shaped: bool, temperature: float | Tensor
):
    case = make_case(vocab=vocab, heads="AAB", shaped=shaped, mask=masks()["holes"])
    assert_equals_reference(chosen, case, temperature=temperature)


@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "scale_bias_cap"])
def test_a_summarised_target_equals_reference(chosen: Place, shaped: bool):
    case = make_case(heads="AAB", shaped=shaped, mask=masks()["holes"])
    assert_equals_reference(chosen, case, summary=case.summary)


def test_a_summarised_target_without_mass_in_the_draft_vocabulary(chosen: Place):
    case = make_case(heads="AAA", shaped=True)
    assert case.target_head.bias is not None
    bias = case.target_head.bias.index_fill(0, case.vocab.ids, -torch.inf)
    case = replace(case, target_head=replace(case.target_head, bias=bias, soft_cap=None))
    assert_equals_reference(chosen, case, summary=case.summary)
    log_alpha = fused(chosen, case, target_summary=case.summary.to(chosen.device))["log_alpha"]
    assert (log_alpha[case.mask] == LOG_ZERO).all()


def test_a_filtered_target_equals_reference(chosen: Place):
    assert_equals_reference(chosen, make_case(heads="AAA"), top_k=4)


@pytest.mark.parametrize("objective", [LKAlpha(), LKLambda(per_token=True)], ids=repr)
def test_gradients_in_forward_equal_reference(chosen: Place, objective: Objective):
    case = make_case(heads="AAA", mask=masks()["holes"])
    on_device = moved(case, chosen.device)
    promised = in_forward(objective, on_device)
    stats = on_device.fused(in_forward=promised)
    assert stats.value is not None
    ours = reduce_loss(stats.value, on_device.mask, counts(on_device))
    reference = objective.values(case.reference(), torch.zeros(len(case.mask)))
    theirs = reduce_loss(reference, case.mask, counts(case))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for one, two in zip(gradients(case, ours), gradients(case, theirs), strict=True):
        assert_close(one, two, 1e-5)


def test_bfloat16_heads(chosen: Place):
    """Within the error that bfloat16 products and gradients have anyway; the statistics are float32."""
    case = make_case(heads="AAA", dtype=torch.bfloat16, vocab=FULL)
    ours = fused(chosen, case)
    theirs: TokenStats = case.reference()
    for name in NAMES:
        assert ours[name].dtype == torch.float32
        assert torch.allclose(ours[name], getattr(theirs, name), atol=3e-2), name
    for one, two in zip(gradients(case, weighted(ours)), gradients(case, weighted(as_dict(theirs))), strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.float(), two.float(), 3e-2)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lkspec.losses.fused import triton_kernels

INTEGERS = {"num_rows", "width", "target_width", "draft_width"}
FLOATS = {"scale", "draft_scale", "target_scale", "factor"}
LONGS = {"top1", "target_top1", "tokens", "ids", "draft_ids"}
LOGITS = {"draft", "target", "logits", "columns"}

def compiled(kernel, **constants):
    constants |= {"ROWS": 1, "LANES": 512}
    kinds = ((INTEGERS, "i32"), (FLOATS, "fp32"), (LONGS, "*i64"), (LOGITS, "*bf16"), (constants, "constexpr"))
    types = {name: next((kind for names, kind in kinds if name in names), "*fp32") for name in kernel.arg_names}
    fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in LOGITS | INTEGERS}
    source = ASTSource(kernel, types, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16, "enable_fp_fusion": True})

for result in (
    compiled(triton_kernels.target_kernel, TRUNCATED=True),
    compiled(triton_kernels.draft_kernel, HAS_TEXT=True, TRUNCATED=True, HAS_SLOPES=True, HAS_REVERSE=True),
    compiled(triton_kernels.slopes_kernel, HAS_REVERSE=False),
):
    assert result.asm["cubin"]
    assert "ld.global.v4.b32" in result.asm["ptx"], "logits are not read 16 bytes at a time"
    assert "atom" not in result.asm["ptx"]
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_hopper_without_one():
    """What the interpreter lets pass, the compiler may not: in a process of its own, since triton decides once."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


# Which functions chunks go through.


def chunks_like(dtype: torch.dtype = torch.float32, row_value: object = None) -> Any:
    return SimpleNamespace(dtype=dtype, row_value=row_value)


@needs_triton
def test_a_gpu_takes_triton_for_what_its_kernels_know():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert fused_linear.row_functions(chunks_like(), gpu).__name__.endswith("triton_rows")
    assert fused_linear.row_functions(chunks_like(), cpu) is torch_rows
    assert fused_linear.row_functions(chunks_like(torch.float64), gpu) is torch_rows
    assert fused_linear.row_functions(chunks_like(row_value=jensen_shannon), gpu) is torch_rows


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fused_linear._has_triton.cache_clear()
    try:
        with pytest.warns(UserWarning, match="triton is not installed"):
            assert fused_linear.row_functions(chunks_like(), torch.device("cuda")) is torch_rows
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert fused_linear.row_functions(chunks_like(), torch.device("cuda")) is torch_rows
    finally:
        fused_linear._has_triton.cache_clear()
