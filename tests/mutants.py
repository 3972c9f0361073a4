"""Plants one fault at a time and says which test catches it: ``make mutants``.

A fault that no test catches is a hole in the tests. The list spans the rooms; ``mutants.csv`` holds what caught each
fault last. Every fault names the test files of its room, the one that catches it first.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TABLE = Path(__file__).with_suffix(".csv")
# Imported once, before a process is forked for each fault.
HEAVY = ("torch", "transformers", "lightning", "hypothesis", "jaxtyping", "hydra", "pandas", "safetensors.torch")


@dataclass(frozen=True)
class Fault:
    """``old``, which the file holds exactly once, becomes ``new``; ``tests`` are files below tests/."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # --- decoding ---------------------------------------------------------------------------------------------------
    Fault(
        "acceptance is decided by p / q, not q / p",
        "decoding/rejection.py",
        "threshold = uniforms[rows, depth] * q.gather(1, vocab.to_draft(tokens))[:, 0]\n"
        "        accepted = threshold < p.gather(1, tokens)[:, 0]",
        "threshold = uniforms[rows, depth] * p.gather(1, tokens)[:, 0]\n"
        "        accepted = threshold < q.gather(1, vocab.to_draft(tokens))[:, 0]",
        ("unit/decoding/test_rejection.py",),
    ),
    Fault(
        "what should be accepted is rejected",
        "decoding/rejection.py",
        "accepted = threshold < p",
        "accepted = threshold >= p",
        ("unit/decoding/test_rejection.py",),
    ),
    Fault(
        "the bonus token comes from p instead of norm(max(p - q, 0))",
        "decoding/rejection.py",
        "residual = (p - q).clamp_min(0.0)",
        "residual = p",
        ("unit/decoding/test_rejection.py",),
    ),
    Fault(
        "after K acceptances the bonus token comes from the row before",
        "decoding/rejection.py",
        "sampling.target_probs(logits[rows, num_depths])",
        "sampling.target_probs(logits[rows, num_depths - 1])",
        ("unit/decoding/test_rejection.py",),
    ),
    Fault(
        "top-p filters before the temperature",
        "decoding/sampling.py",
        "dropped = ordered.cumsum(-1) - ordered >= top_p",
        "warm = ordered.pow(temperature) / ordered.pow(temperature).sum(-1, keepdim=True)\n"
        "        dropped = warm.cumsum(-1) - warm >= top_p",
        ("unit/decoding/test_sampling.py",),
    ),
    Fault(
        "all prompts share their random numbers",
        "decoding/sampling.py",
        'f"{seed}\\x00{prompt_id}\\x00{turn}"',
        'f"{seed}"',
        ("unit/decoding/test_sampling.py", "unit/decoding/test_chain.py"),
    ),
    Fault(
        "sharpness is ignored in decoding",
        "decoding/sampling.py",
        "temperature = self.temperature / self.sharpness",
        "temperature = self.temperature",
        ("unit/decoding/test_sampling.py",),
    ),
    Fault(
        "accepted tokens are counted after the cut",
        "decoding/rows.py",
        "self.rounds.append((len(self.tokens), len(accepted)))",
        "self.rounds.append((len(self.tokens), min(len(accepted), self.limit - len(self.tokens))))",
        ("unit/decoding/test_chain_ends.py",),
    ),
    Fault(
        "no round lies past the end",
        "decoding/rows.py",
        "past_end=position + num_draft_tokens > len(self.tokens)",
        "past_end=False",
        ("unit/decoding/test_chain_ends.py",),
    ),
    Fault(
        "the walk counts a round that reaches one token out of its turn",
        "decoding/walk.py",
        "+ depths < lengths[:, None]",
        "+ depths <= lengths[:, None]",
        ("unit/decoding/test_walk.py",),
    ),
    # --- nn ---------------------------------------------------------------------------------------------------------
    Fault(
        "a cache keeps the entry of a rejected token",
        "nn/kv_cache.py",
        "buffers[layer_idx][self._rows, :, positions] = new.transpose(1, 2)",
        "kept = buffers[layer_idx][self._rows, :, positions]\n"
        "            buffers[layer_idx][self._rows, :, positions] = torch.where(kept != 0, kept, new.transpose(1, 2))",
        ("unit/nn/test_kv_cache.py",),
    ),
    Fault(
        "a sliding window is one position too wide",
        "nn/attention.py",
        "visible & (distance + self.ahead < self.window)",
        "visible & (distance + self.ahead <= self.window)",
        ("unit/nn/test_attention_causal.py", "unit/nn/test_attention.py"),
    ),
    Fault(
        "the slope of an own entry has another sign",
        "nn/attention.py",
        "weight * (_dot(d_mixed, value) - _grouped(common, keys)) * ctx.scaling",
        "weight * (_grouped(common, keys) - _dot(d_mixed, value)) * ctx.scaling",
        ("unit/nn/test_attention_causal.py", "unit/nn/test_attention.py"),
    ),
    # --- drafts -----------------------------------------------------------------------------------------------------
    Fault(
        "packed conversations attend to one another",
        "drafts/layers.py",
        "CausalMask.of(batch.segments, as_made=batch.as_made.segments, window=",
        "CausalMask.of(torch.ones_like(batch.segments), window=",
        ("unit/drafts/test_contracts.py", "unit/drafts/test_drafts_training.py"),
    ),
    Fault(
        "RoPE of a deeper depth stays at the anchor in training",
        "drafts/layers.py",
        "mask, positions = replace(visible, ahead=depth - 1), batch.positions + depth - 1",
        "mask, positions = replace(visible, ahead=depth - 1), batch.positions",
        ("unit/drafts/test_eagle3.py", "unit/drafts/test_contracts.py", "unit/drafts/test_drafts_decoding.py"),
    ),
    Fault(
        "a drafted token is one position too far in decoding",
        "drafts/layers.py",
        "self.cached_step(cache, tokens[-1][:, None], hidden, anchors + depth - 1)",
        "self.cached_step(cache, tokens[-1][:, None], hidden, anchors + depth)",
        ("unit/drafts/test_drafts_decoding.py",),
    ),
    Fault(
        "a depth reads the token that it should propose",
        "drafts/mlp.py",
        "step(state, shifted(batch.tokens, depth), depth)",
        "step(state, shifted(batch.tokens, depth + 1), depth)",
        ("unit/drafts/test_mlp.py", "unit/drafts/test_contracts.py", "unit/drafts/test_drafts_decoding.py"),
    ),
    Fault(
        "the draft's anchor is the last slot of the batch, not of its row",
        "types.py",
        "device=values.device), self.lengths - 1]",
        "device=values.device), -1]",
        ("unit/drafts/test_drafts_decoding.py", "unit/drafts/test_medusa.py"),
    ),
    # --- types and vocab --------------------------------------------------------------------------------------------
    Fault(
        "the mask is shifted by one",
        "types.py",
        "shifted[offset - 1, :, :-offset] = turns[:, offset:]",
        "shifted[offset - 1, :, : -offset or None] = turns[:, offset - 1 : -1]",
        ("unit/test_types.py",),
    ),
    Fault(
        "a head forgets its bias",
        "types.py",
        "logits = logits + self.bias",
        "pass",
        ("unit/losses/test_head_summary.py", "unit/targets/test_target_description.py", "unit/test_types.py"),
    ),
    Fault(
        "d2t is off by one",
        "vocab.py",
        "return self.ids - torch.arange(self.size, device=self.ids.device)",
        "return self.ids - torch.arange(self.size, device=self.ids.device) - 1",
        ("unit/test_vocab.py", "unit/export/test_plain_eagle3.py"),
    ),
    # --- losses -----------------------------------------------------------------------------------------------------
    Fault(
        "the gradient of KL has a wrong sign in p",
        "losses/fused/torch_rows.py",
        "q.addcmul_(p, (d_kl / coverage)[block, None], value=-1)",
        "q.addcmul_(p, (d_kl / coverage)[block, None], value=1)",
        ("unit/losses/test_fused_rows.py", "unit/losses/test_fused_linear.py"),
    ),
    Fault(
        "the gradient of log alpha lacks its mean",
        "losses/fused/torch_rows.py",
        "q.mul_((d_kl[block] - d_alpha[block] * below.sum(-1))[:, None])",
        "q.mul_(d_kl[block, None])",
        ("unit/losses/test_fused_rows.py", "unit/losses/test_fused_linear.py"),
    ),
    Fault(
        "the Triton kernel's gradient of p has a wrong sign",
        "losses/fused/triton_kernels.py",
        "slope = tl.exp2(u) * weight - of_p[:, None, None] * tl.exp2(w)",
        "slope = tl.exp2(u) * weight + of_p[:, None, None] * tl.exp2(w)",
        ("unit/losses/test_fused_triton.py",),
    ),
    Fault(
        "the Triton kernel takes the smaller ratio as min(p, q)",
        "losses/fused/triton_kernels.py",
        "tl.exp2(tl.minimum(log_ratio, 0.0))",
        "tl.exp2(tl.maximum(log_ratio, 0.0))",
        ("unit/losses/test_fused_triton.py",),
    ),
    Fault(
        "the soft cap is left out of the slope",
        "losses/fused/logits.py",
        "slopes = slopes * (1 - (values * (temperature / self.head.soft_cap)) ** 2)",
        "pass",
        ("unit/losses/test_fused_linear.py", "unit/losses/test_fused_rows.py"),
    ),
    Fault(
        "the target's mass inside the draft vocabulary is taken for 1",
        "losses/fused/target_rows.py",
        "log_coverage[block] += log_sum - normaliser",
        "log_coverage[block] += 0.0 * normaliser",
        ("unit/losses/test_target_filter.py", "unit/losses/test_fused_linear.py"),
    ),
    Fault(
        "a target row serves the anchor after its own",
        "losses/fused/chunks.py",
        "anchors = depths * mask[0].numel() + rows - (depths + 1)",
        "anchors = depths * mask[0].numel() + rows - depths",
        ("unit/losses/test_fused_linear.py", "unit/losses/test_token_stats.py"),
    ),
    Fault(
        "gamma's exponent begins at 1",
        "losses/objectives.py",
        "gamma**exponent for exponent in range(num_depths)",
        "gamma**exponent for exponent in range(1, num_depths + 1)",
        ("unit/losses/test_objectives.py",),
    ),
    Fault(
        "lambda follows alpha over all depths",
        "losses/objectives.py",
        "return torch.exp(-self.eta * mean_alpha)",
        "return torch.exp(-self.eta * mean_alpha.mean()).expand_as(mean_alpha)",
        ("unit/losses/test_objectives.py",),
    ),
    # --- training ---------------------------------------------------------------------------------------------------
    Fault(
        "N_k counts one micro-batch, not the step",
        "training/module.py",
        "counts = self._summed(counts.to(self.device))",
        "counts = batches[0].depth_mask(self.draft.num_depths).sum((1, 2)).to(self.device)",
        ("unit/training/test_module.py",),
    ),
    Fault(
        "DDP's averaging is not undone",
        "training/module.py",
        "self.manual_backward(loss * self.trainer.world_size)",
        "self.manual_backward(loss)",
        ("unit/training/test_module.py", "integration/test_ddp.py"),
    ),
    Fault(
        "a resumed run draws other random numbers",
        "training/module.py",
        'restore_rng_state(saved["rng"])',
        "pass",
        ("unit/training/test_module.py", "integration/test_drafts.py", "integration/test_resume.py"),
    ),
    Fault(
        "sharpness is ignored by the walk",
        "training/statistics.py",
        "draft.head(depth).sharpened(sharpness)",
        "draft.head(depth).sharpened(1.0)",
        ("integration/test_walk.py",),
    ),
    # --- data -------------------------------------------------------------------------------------------------------
    Fault(
        "the end-of-turn token is not supervised",
        "data/chat.py",
        "turns[start:stop] = [turn] * (stop - start)",
        "turns[start : stop - 1] = [turn] * (stop - 1 - start)",
        ("unit/data/test_chat.py",),
    ),
    Fault(
        "the mask includes a token of the chat header",
        "data/chat.py",
        "turns[start:stop] = [turn] * (stop - start)",
        "turns[start - 1 : stop] = [turn] * (stop - start + 1)",
        ("unit/data/test_chat.py",),
    ),
    Fault(
        "positions run on through packed conversations",
        "data/dataset.py",
        "positions[b, span] = torch.arange(length)",
        "positions[b, span] = torch.arange(start, start + length)",
        ("unit/data/test_dataset.py",),
    ),
    Fault(
        "training resumes one batch late",
        "data/dataset.py",
        "for step in range(self.step, self._num_steps):",
        "for step in range(self.step + (self.step > 0), self._num_steps):",
        ("unit/data/test_dataset.py",),
    ),
    Fault(
        "held-out conversations are trained on",
        "data/datamodule.py",
        "(encoded.validation if held_out else encoded.train).append(one)",
        "encoded.train.append(one)\n            _ = encoded.validation.append(one) if held_out else None",
        ("unit/data/test_datamodule.py",),
    ),
    Fault(
        "the token cache does not know the chat template",
        "data/tokenised.py",
        "[tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]",
        "[tokenizer.backend_tokenizer.to_str()]",
        ("unit/data/test_token_cache.py",),
    ),
    Fault(
        "a capture holds its states in another order",
        "data/capture_format.py",
        "for part in (states.aux, states.last))",
        "for part in (states.last, states.aux))",
        ("unit/data/test_captured.py",),
    ),
    # --- measure and reporting --------------------------------------------------------------------------------------
    Fault(
        "the interval resamples rounds, not prompts",
        "measure/metrics.py",
        "counts = np.array([count for count in groups.values() if count[1] > 0], dtype=np.float64).reshape(-1, 2)",
        "counts = np.array([(count, 1) for count in accepted], dtype=np.float64).reshape(-1, 2)",
        ("unit/measure/test_metrics.py",),
    ),
    Fault(
        "rounds past the end count though they should not",
        "measure/metrics.py",
        "if not (exclude_past_end and round.past_end)",
        "if not (exclude_past_end and False)",
        ("unit/measure/test_metrics.py",),
    ),
    Fault(
        "a paired gain is not paired",
        "reporting/intervals.py",
        "differences.append((ratios - other_ratios, parts - other_parts))",
        "differences.append((ratios - other_ratios, parts - other_parts[:, ::-1]))",
        ("unit/reporting/test_intervals.py",),
    ),
    # --- runs -------------------------------------------------------------------------------------------------------
    Fault(
        "a run's name does not depend on its vocabulary",
        "runs/keys.py",
        '"vocab": Kind.TRAINED',
        '"vocab": Kind.OUTPUT',
        ("unit/runs/test_keys.py",),
    ),
    Fault(
        "a run is not stale where its data changed",
        "runs/identity.py",
        'for name in ("target", "data") if',
        'for name in ("target",) if',
        ("unit/runs/test_identity.py",),
    ),
    # --- export -----------------------------------------------------------------------------------------------------
    Fault(
        "the export's final norm is that of an untrained draft",
        "export/base.py",
        'return {name: tensor for name, tensor in draft.state_dict().items() if name != "vocab.ids"}',
        "own = {name: tensor for name, tensor in draft.state_dict().items() if name != 'vocab.ids'}\n"
        "    return {name: tensor * 0 + 1 if name == 'norm.weight' else tensor for name, tensor in own.items()}",
        ("unit/export/test_plain_eagle3.py",),
    ),
    Fault(
        "rows of an imported head keep the checkpoint's order",
        "export/base.py",
        "(rows[ids] if len(rows) > len(ids) else rows)[torch.argsort(ids)]",
        "rows[ids] if len(rows) > len(ids) else rows",
        ("unit/export/test_plain_eagle3.py",),
    ),
)


class FirstFailure:
    """A pytest plugin that remembers the first test that failed."""

    name = ""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def run_tests(tree: Path, tests: tuple[str, ...], answer: Connection) -> None:
    """In a process of its own: sends the first test that fails, or nothing."""
    import pytest

    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)
    sys.path.insert(0, str(tree))
    sys.stdout = sys.stderr = (tree / "output.txt").open("w")
    first = FirstFailure()
    files = [f"tests/{file}" for file in tests]
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[first])
    answer.send(first.name if first.name or code == 0 else f"(exit code {int(code)})")


def caught_by(tree: Path, tests: tuple[str, ...], *, timeout: float = 900) -> str:
    """The first test that fails; empty where all pass."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(tree, tests, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(timeout) else "(no answer in time)"
    except EOFError:
        return "(the process died)"
    finally:
        process.kill()
        process.join()


def planted(tree: Path, fault: Fault) -> tuple[Path, str]:
    """Writes the fault into the copy; returns the file and its text before.

    Raises:
        ValueError: the file does not hold ``old`` exactly once, or a test file is not there.
    """
    if missing := [test for test in fault.tests if not (tree / "tests" / test).is_file()]:
        raise ValueError(f"there is no tests/{missing[0]}")
    file = tree / "lkspec" / fault.file
    before = file.read_text() if file.is_file() else ""
    if before.count(fault.old) != 1:
        raise ValueError(f"{fault.file} holds {before.count(fault.old)} times, not once: {fault.old!r}")
    file.write_text(before.replace(fault.old, fault.new))
    return file, before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only faults whose name or file holds one of these")
    parser.add_argument("--check", action="store_true", help="only look whether every fault can be planted")
    arguments = parser.parse_args()
    chosen = [f for f in FAULTS if not arguments.names or any(n in f.name or n in f.file for n in arguments.names)]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("lkspec", "conf", "tests"):
            shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "pyproject.toml", tree)
        for module in () if arguments.check else HEAVY:
            importlib.import_module(module)
        for fault in chosen:
            start = time.monotonic()
            try:
                file, before = planted(tree, fault)
            except ValueError as error:
                results.append((fault, "", str(error)))
                print(f"NOT PLANTED   {fault.name}: {error}", flush=True)
                continue
            test = "(not run)" if arguments.check else caught_by(tree, fault.tests).removeprefix("tests/")
            file.write_text(before)
            seconds = time.monotonic() - start
            problem = "" if test and not (test.startswith("(") and not arguments.check) else test or "survived"
            results.append((fault, test, problem))
            print(f"{'PROBLEM' if problem else 'caught '} {seconds:5.0f} s  {fault.name}: {test}", flush=True)
    if not arguments.check and not arguments.names:
        with TABLE.open("w", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["fault", "file", "caught by"])
            writer.writerows((fault.name, fault.file, test) for fault, test, _ in results)
    problems = [f"{fault.name}: {problem}" for fault, _, problem in results if problem]
    if problems:
        sys.exit(f"{len(problems)} of {len(results)} faults were not caught:\n" + "\n".join(problems))
    print(f"all {len(results)} faults {'can be planted' if arguments.check else 'were caught'}")


if __name__ == "__main__":
    main()
