"""``lkspec evaluate`` by vLLM or a server, with stand-ins: the export vLLM is given, rows beside ours, throughput."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from command_line import BRIEF_EVALUATION, NO_EVALUATION, REPOSITORY, TINY_DATA, Run
from engine_stub import EngineStub, running

from lkspec.benchmarks.mini import Mini
from lkspec.decoding.chain import ChainDecoder, Request
from lkspec.decoding.sampling import Sampling
from lkspec.runs.find import list_runs
from lkspec.runs.folder import RunFolder
from lkspec.runs.rows import ResultRow
from lkspec.targets.tiny import TinyTarget

pytestmark = pytest.mark.slow

FAKE = Path(__file__).parents[1] / "fake_vllm"
ENGINE = ("engine=vllm", f"engine.python={sys.executable}")
MEASURED = ("run=latest", *BRIEF_EVALUATION, "num_draft_tokens=[2]", "temperatures=[0]")
THROUGHPUT = ("concurrency=[2]", "num_draft_tokens=[0,2]", "num_requests=5", "max_new_tokens=4")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAKE))


def train(cli: Run, tmp_path: Path, *overrides: str) -> TinyTarget:
    target = TinyTarget(device="cpu")
    target.model.save_pretrained(tmp_path / "target")
    target.tokenizer.save_pretrained(tmp_path / "target")
    saved = ("target=transformers", f"target.path={tmp_path / 'target'}", "target.dtype=float32", "target.device=cpu")
    data = [override for override in TINY_DATA if not override.startswith("target")]
    run = (*data, *saved, "debug=smoke", "trainer.max_steps=1", "trainer.accelerator=cpu", *NO_EVALUATION)
    outcome = cli("train", *run, "draft.num_depths=2", *overrides)
    assert outcome.code == 0, outcome.err
    return target


def write_answers(target: TinyTarget, folder: Path) -> None:
    """What the target itself answers to the prompts of ``MEASURED``, for the stand-in to repeat."""
    decoder = ChainDecoder(target, None, sampling=Sampling(0.0), num_draft_tokens=0, batch_size=2)
    answers = {str(list(done.request.tokens)): done.tokens for done in decoder.run(brief_requests(target))}
    (folder / "answers.json").write_text(json.dumps(answers))


def brief_requests(target: TinyTarget) -> list[Request]:
    settings = yaml.safe_load((REPOSITORY / "conf/benchmark/mini_math.yaml").read_text())["mini_math"]
    requests = []
    for prompt in Mini(suite="math", num_prompts=2, template=settings["template"]).prompts():
        messages = [{"role": "user", "content": prompt.turns[0]}]
        requests.append(Request(prompt.id, 0, target.prompt_ids(messages), 16))
    return requests


def only_run() -> RunFolder:
    [run] = list_runs(Path("runs"))
    return run


def results() -> dict[str, ResultRow]:
    return {row.engine: row for row in only_run().read_results()}


def test_rows_of_the_engine_stand_beside_ours(lkspec_cli, tmp_path):
    target = train(lkspec_cli, tmp_path)
    assert lkspec_cli("evaluate", *MEASURED).code == 0
    outcome = lkspec_cli("evaluate", *MEASURED, *ENGINE)
    assert outcome.code == 2
    assert "engine=vllm: 32 tokens written at T=0 are not the target's own" in outcome.err
    write_answers(target, tmp_path / "target")
    outcome = lkspec_cli("evaluate", *MEASURED, *ENGINE)
    assert outcome.code == 0, outcome.err
    assert "decoded by vllm" in outcome.out
    rows = results()
    assert set(rows) == {"lkspec", "vllm"}
    # The stand-in accepts one token in every round, at the first position.
    assert (rows["vllm"].tau, rows["vllm"].alpha) == (2.0, (1.0, 0.0))
    assert rows["vllm"].tau_whole_rounds is None
    assert json.loads(rows["vllm"].protocol)["engine_version"] == "vLLM 0.0-fake"
    assert "math T=0: tau 2.000, but this run's draft would have had" in outcome.out  # it is not the run's draft


def test_throughput_of_vllm(lkspec_cli, tmp_path):
    train(lkspec_cli, tmp_path)
    outcome = lkspec_cli("throughput", "run=latest", *ENGINE, *THROUGHPUT, "concurrency=[1,3]")
    assert outcome.code == 0, outcome.err
    rows = only_run().read_throughput()
    assert [(row.num_draft_tokens, row.concurrency) for row in rows] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    # The stand-in takes as many seconds a token as ever waited together: 1 and 3, in either process.
    assert [row.median_ms_per_token for row in rows] == [1000, 3000, 1000, 3000]
    assert {(row.num_tokens, row.num_requests) for row in rows} == {(20, 5)}
    assert re.search(r"(best K|drafting loses) at concurrency 3", outcome.out)
    assert only_run().read_results() == []


class TestServer:
    @pytest.fixture
    def run(self, lkspec_cli) -> Run:
        run = (*TINY_DATA, "debug=smoke", "trainer.max_steps=1", *NO_EVALUATION, "draft.num_depths=2")
        assert lkspec_cli("train", *run).code == 0
        return lkspec_cli

    @staticmethod
    def stub(target: TinyTarget, **options) -> EngineStub:
        decoder = ChainDecoder(target, None, sampling=Sampling(0.0), num_draft_tokens=0, batch_size=1)

        def answer(prompt: Sequence[int], max_tokens: int) -> list[int]:
            return list(next(iter(decoder.run([Request("p", 0, tuple(prompt), max_tokens)]))).tokens)

        return EngineStub(served=target.name, model=answer, **options)

    def test_rows_stand_beside_ours(self, run, tiny_target):
        with running(self.stub(tiny_target)) as stub:
            outcome = run("evaluate", *MEASURED, "engine=server", f"engine.base_url={stub.url}")
            assert outcome.code == 0, outcome.err
            assert [tuple(body["prompt"]) for body in stub.requests] == [r.tokens for r in brief_requests(tiny_target)]
            rounds, accepted = sum(stub.histogram), sum(a * count for a, count in enumerate(stub.histogram))
            row = results()["server"]
            assert row.tau == 1 + accepted / rounds
            assert json.loads(row.protocol)["engine_version"] == "vLLM 0.99"
            outcome = run("evaluate", *MEASURED, "num_draft_tokens=[3]", "engine=server", f"engine.base_url={stub.url}")
            assert "drafts 2 tokens a round, but num_draft_tokens asks for 3" in outcome.error_line

    def test_tables_of_several_servers_are_one(self, run, tiny_target):
        command = ("throughput", "run=latest", "engine=server", *THROUGHPUT)
        with running(self.stub(tiny_target, num_draft_tokens=0)) as stub:
            outcome = run(*command, f"engine.base_url={stub.url}", "engine.hardware=H100")
            assert outcome.code == 0, outcome.err
            assert "concurrency 2: nothing to compare with, as nothing was measured with a draft yet" in outcome.out
        for depths in (2, 5):
            with running(self.stub(tiny_target, num_draft_tokens=depths)) as stub:
                outcome = run(*command, f"engine.base_url={stub.url}", "engine.hardware=H100")
        assert re.search(r"(best K|drafting loses) at concurrency 2", outcome.out)
        assert [row.num_draft_tokens for row in only_run().read_throughput()] == [0, 2, 5]
        assert len(re.findall(r"^│ +2 │", outcome.out, flags=re.MULTILINE)) == 3
        assert "measured on a CPU" not in outcome.out

    def test_a_server_needs_an_address(self, run):
        outcome = run("throughput", "run=latest", "engine=server")
        assert "engine.base_url: expected the server's address" in outcome.error_line


def test_a_draft_that_vllm_does_not_serve(lkspec_cli, tmp_path):
    train(lkspec_cli, tmp_path, "draft=mtp")
    outcome = lkspec_cli("evaluate", "run=latest", *BRIEF_EVALUATION, *ENGINE)
    assert outcome.code == 2
    assert "vLLM does not serve this draft (research only" in outcome.err


def test_a_target_in_memory_is_saved_for_vllm(lkspec_cli):
    run = (*TINY_DATA, "debug=smoke", "trainer.max_steps=1", *NO_EVALUATION, "draft.num_depths=2")
    assert lkspec_cli("train", *run).code == 0
    outcome = lkspec_cli("throughput", "run=latest", "benchmark=mini", *ENGINE, *THROUGHPUT)
    assert outcome.code == 0, outcome.err
    log = Path("vllm.log").read_text()
    assert "max_model_len 2048" in log  # the target's limit, below the engine's 4096
    listed, *again = [line for line in log.splitlines() if line.startswith("the target's folder")]
    assert again == [listed]  # the process without a draft and that with one
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        assert f"'{name}'" in listed
