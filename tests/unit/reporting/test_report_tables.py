"""Tables: what goes into a cell, what is refused, what is missing, and what stands beside."""

from __future__ import annotations

import shlex

import pytest
from helpers.report_runs import decoded, make_run, make_study, measure, walk_held_out

from lkspec.measure.metrics import paired_difference_interval
from lkspec.reporting.counts import find_runs, read_series
from lkspec.reporting.labels import objective_label, published_overrides
from lkspec.reporting.layout import Layout
from lkspec.reporting.model import Cell, Table
from lkspec.reporting.tables import build_table


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return find_runs(str(make_study(tmp_path_factory.mktemp("study")) / "*"))


def cell(table: Table, row: str, column: str, source: str = "ours") -> Cell:
    for found in table.rows:
        if (" ".join(found.labels), found.source) == (row, source):
            return found.cells[[" ".join(c) for c in table.columns].index(column)]
    raise AssertionError(f"no row {row}: {[r.labels for r in table.rows]}")


# --- reading


def test_counts_add_up_to_what_the_run_reported(study):
    taus = {(row.run, row.benchmark, row.temperature): row.tau for run in study for row in run.read_results()}
    whole = {(row.run, row.benchmark, row.temperature): row.tau_whole_rounds for r in study for row in r.read_results()}
    shares = {(row.run, row.benchmark, row.temperature): row.alpha for run in study for row in run.read_results()}
    for measure_name, expected in (("tau", taus), ("whole_rounds", whole)):
        series = read_series(study, measure_name)
        assert {(s.run.name, s.get("benchmark"), s.get("temperature")): s.value for s in series} == pytest.approx(
            expected
        )
        assert all(len(s.groups) == 12 for s in series)
    for s in read_series(study, "accepted"):
        where = (s.run.name, s.get("benchmark"), s.get("temperature"))
        assert s.value == pytest.approx(shares[where][s.get("depth") - 1])


def test_the_walk_is_known_at_every_depth(tmp_path):
    rows = walk_held_out(make_run(tmp_path))
    for s in read_series(find_runs(str(tmp_path / "*")), "walk"):
        chosen = [r for r in rows if (r.temperature, r.depth) == (s.get("temperature"), s.get("num_draft_tokens"))]
        assert s.value == pytest.approx(1 + sum(r.accepted for r in chosen) / sum(r.rounds for r in chosen))
    for s in read_series(find_runs(str(tmp_path / "*")), "alpha"):
        chosen = [r for r in rows if (r.temperature, r.depth) == (s.get("temperature"), s.get("depth"))]
        assert s.value == pytest.approx(sum(r.alpha for r in chosen) / sum(r.num_tokens for r in chosen))


def test_rounds_of_a_later_measurement_are_not_taken_for_an_earlier_one(tmp_path):
    run = make_run(tmp_path)
    measure(run, num_prompts=5)
    measure(run, num_prompts=12, gain=0.1)
    by_prompts = {s.settings["protocol"]["num_prompts"]: s for s in read_series([run], "tau")}
    assert (len(by_prompts[5].groups), len(by_prompts[12].groups)) == (0, 12)
    taus = {row.num_prompts: row.tau for row in run.read_results()}
    assert {number: s.value for number, s in by_prompts.items()} == pytest.approx(taus)


def test_the_row_after_the_most_training_counts(tmp_path):
    run = make_run(tmp_path)
    measure(run, gain=-0.1, steps=0, with_rounds=False, num_prompts=4)
    after = measure(run)
    measure(run, steps=5, with_rounds=False)
    (series,) = read_series([run], "tau")
    assert series.value == pytest.approx(after.tau)
    assert series.groups


@pytest.mark.parametrize(("pattern", "told"), [("nothing/*", "found 0 paths"), ("*.txt", "found 1 paths")])
def test_patterns_without_runs_are_refused(tmp_path, pattern, told):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=rf"runs=.*{told} and no run among them"):
        find_runs(str(tmp_path / pattern))


def test_a_run_matched_twice_counts_once(study):
    path = str(study[0].path)
    assert len(find_runs([path, path + "*"])) == 1


# --- cells


def test_one_seed_agrees_with_the_paired_bootstrap(tmp_path):
    for loss, gain in (("kl", 0.0), ("lk_lambda", 0.1)):
        measure(make_run(tmp_path, loss=loss), num_prompts=60, gain=gain)
    runs = find_runs(str(tmp_path / "*"))
    gain = cell(build_table(runs, Layout(baseline="kl")), "mlp lk_lambda", "1 mini_chat").gain
    counts = []
    for run in (runs[1], runs[0]):
        sums: dict[str, tuple[float, float]] = {}
        for row in run.read_rounds():
            accepted, rounds = sums.get(row.prompt_id, (0.0, 0.0))
            sums[row.prompt_id] = (accepted + row.accepted, rounds + 1)
        counts.append(sums)
    value, low, high = paired_difference_interval(*counts, confidence=0.95)
    assert gain.value == pytest.approx(value)
    assert (gain.low, gain.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_gains_are_paired_over_the_seeds_that_both_have(study, tmp_path):
    extra = make_run(tmp_path, seed=7)
    for temperature in (0.0, 1.0):
        measure(extra, temperature=temperature)
        measure(extra, temperature=temperature, benchmark="mini_code")
    table = build_table([*study, extra], Layout(baseline="kl", mean="benchmark"))
    base, better = cell(table, "mlp kl", "1 mini_chat"), cell(table, "mlp lk_lambda", "1 mini_chat")
    assert (base.estimate.num_seeds, better.estimate.num_seeds, better.gain.num_seeds) == (4, 3, 3)
    assert base.gain is None
    assert better.is_resolved
    taus = {
        (s.get("loss"), s.get("seed")): s.value for s in read_series(study, "tau") if is_cell(s, "mlp", 1, "mini_chat")
    }
    assert better.gain.value == pytest.approx(sum(taus["lk_lambda", s] - taus["kl", s] for s in range(3)) / 3)
    assert any("fewer: " in sentence and "mlp lk_lambda_eta_3 3" in sentence for sentence in table.caption)


def is_cell(series, draft, temperature, benchmark) -> bool:
    wanted = {"draft": draft, "temperature": temperature, "benchmark": benchmark}
    return all(series.get(key) == value for key, value in wanted.items())


def test_the_mean_column_averages_benchmarks_and_is_narrower(study):
    table = build_table(study, Layout(baseline="kl", mean="benchmark"))
    assert [column for column in table.columns if column[0] == "1"] == [
        ("1", "mini_chat"),
        ("1", "mini_code"),
        ("1", "mean"),
    ]
    chat, code, mean = (cell(table, "mlp lk_lambda", f"1 {name}") for name in ("mini_chat", "mini_code", "mean"))
    assert mean.estimate.value == pytest.approx((chat.estimate.value + code.estimate.value) / 2)
    assert mean.gain.value == pytest.approx((chat.gain.value + code.gain.value) / 2)
    assert mean.estimate.num_groups == 24


def test_per_depth_tables_show_where_a_gain_sits(study):
    table = build_table(study, Layout(baseline="kl", value="alpha", columns=["temperature", "depth"]))
    assert cell(table, "mlp lk_lambda", "1 3").gain.value == pytest.approx(0.1 * 0.9**2)
    assert cell(table, "mlp lk_lambda", "0 1").gain.value == pytest.approx(0.1)


def test_the_walk_takes_the_largest_k_unless_told(study):
    largest = build_table(study, Layout(value="walk", columns=["temperature"]))
    every = build_table(study, Layout(value="walk", columns=["temperature", "num_draft_tokens"]))
    assert cell(largest, "mlp kl", "1").estimate == cell(every, "mlp kl", "1 3").estimate
    assert any("16" in sentence and "K = 3" in sentence for sentence in largest.caption)


def test_q_is_as_trained_unless_told(study):
    for run in study:
        walk_held_out(run, temperatures=(1.0,), gain=0.2, sharpness=1.5)
        if run.config["seed"] < 2:
            row, rounds = decoded(run, gain=0.2, sharpness=1.5)
            run.write_results([row])
            run.write_rounds(rounds)
    for value in ("walk", "tau"):
        where = {"temperature": 1, "benchmark": "held_out" if value == "walk" else "mini_chat"}
        plain = build_table(study, Layout(value=value, columns=["temperature"], where=where))
        layout = Layout(
            rows=["draft", "loss", "sharpness"], columns=["temperature"], value=value, where=where,
            baseline={"sharpness": 1},
        )  # fmt: skip
        table = build_table(study, layout)
        assert cell(table, "mlp kl 1", "1").estimate == cell(plain, "mlp kl", "1").estimate
        sharper = cell(table, "mlp kl 1.5", "1")
        assert sharper.gain.value > 0.1
        assert any(line.startswith("Signed: the gain over sharpness 1, ") for line in table.caption)
        assert sharper.gain.num_seeds == (3 if value == "walk" else 2)


def test_a_missing_sharpness_shows_the_command_that_walks_it(tmp_path):
    for loss in ("kl", "tv"):
        walk_held_out(make_run(tmp_path, loss=loss))
    walk_held_out(find_runs(str(tmp_path / "*kl*"))[0], temperatures=(1.0,), sharpness=1.5)
    layout = Layout(rows=["loss"], columns=["sharpness", "temperature"], value="walk")
    table = build_table(find_runs(str(tmp_path / "*")), layout)
    (run,) = find_runs(str(tmp_path / "*tv*"))
    assert table.commands == (f"lkspec walk run={run.path} 'sharpness=[1.5]'",)
    assert cell(table, "tv", "1.5 1").missing == (1,)


def test_any_key_of_the_configuration_tells_rows_apart(tmp_path):
    for size, gain in ((64, 0.0), (128, 0.1)):
        measure(make_run(tmp_path, tag=f"{size:08}", config={"vocab": {"size": size}}), gain=gain)
    runs = find_runs(str(tmp_path / "*"))
    table = build_table(runs, Layout(rows=["draft", "vocab.size"], baseline=64))
    assert cell(table, "mlp 128", "1 mini_chat").gain.value > 0
    with pytest.raises(ValueError, match=r"differ in vocab\.size \(64 and 128\); add vocab\.size to rows or columns"):
        build_table(runs, Layout())
    chosen = build_table(runs, Layout(where={"vocab.size": 128}))
    assert cell(chosen, "mlp kl", "1 mini_chat").runs == (runs[1].name,)


# --- what is refused


def test_settings_are_not_mixed_in_a_cell(study):
    with pytest.raises(ValueError, match=r"mixes draft medusa, mlp; add draft to rows or columns, or choose"):
        build_table(study, Layout(rows=["loss"]))
    with pytest.raises(ValueError, match="mixes temperature 0, 1"):
        build_table(study, Layout(columns=["benchmark"]))
    with pytest.raises(ValueError, match="mixes depth 1, 2, 3"):
        build_table(study, Layout(value="alpha", columns=["temperature"]))


def test_numbers_of_draft_tokens_are_not_mixed(tmp_path):
    run = make_run(tmp_path)
    for depths in (2, 3):
        measure(run, depths=depths)
    with pytest.raises(ValueError, match=r"mixes num_draft_tokens 2, 3; .* '\+where\.num_draft_tokens=3'"):
        build_table([run], Layout())
    assert cell(build_table([run], Layout(where={"num_draft_tokens": "max"})), "mlp kl", "1 mini_chat").estimate
    assert len(build_table([run], Layout(columns=["num_draft_tokens"])).columns) == 2


def test_protocols_are_not_mixed(tmp_path):
    for seed, limit in ((0, 32), (1, 64)):
        measure(make_run(tmp_path, seed=seed), protocol={"max_new_tokens": limit})
    runs = find_runs(str(tmp_path / "*"))
    with pytest.raises(
        ValueError, match=r"different protocols.*max_new_tokens \(32 and 64\).*\+where\.max_new_tokens=64"
    ):
        build_table(runs, Layout())
    chosen = build_table(runs, Layout(where={"max_new_tokens": 64}))
    assert cell(chosen, "mlp kl", "1 mini_chat").runs == (runs[1].name,)


def test_the_batch_size_is_no_part_of_the_protocol_of_tau(tmp_path):
    for seed, size in ((0, 1), (1, 16)):
        measure(make_run(tmp_path, seed=seed), protocol={"batch_size": size})
    assert cell(build_table(find_runs(str(tmp_path / "*")), Layout()), "mlp kl", "1 mini_chat").estimate.num_seeds == 2


def test_a_plain_baseline_of_another_row_key_than_the_last_is_refused_with_what_to_say(study):
    with pytest.raises(ValueError, match=r"no row has draft kl; say 'baseline=\{loss:kl\}'"):
        build_table(study, Layout(rows=["loss", "draft"], baseline="kl"))
    assert build_table(study, Layout(rows=["loss", "draft"], baseline={"loss": "kl"})).rows


def test_a_baseline_of_another_protocol_is_refused(tmp_path):
    for loss, limit in (("kl", 32), ("tv", 64)):
        measure(make_run(tmp_path, loss=loss), protocol={"max_new_tokens": limit})
    with pytest.raises(ValueError, match=r"another protocol than its baseline mlp, kl: max_new_tokens \(64 and 32\)"):
        build_table(find_runs(str(tmp_path / "*")), Layout(baseline="kl"))


def test_walks_along_other_texts_are_not_compared(tmp_path):
    for loss, number in (("kl", 16), ("tv", 15)):
        walk_held_out(make_run(tmp_path, loss=loss), num_texts=number)
    with pytest.raises(ValueError, match="another protocol than its baseline mlp, kl: texts"):
        build_table(find_runs(str(tmp_path / "*")), Layout(value="walk", columns=["temperature"], baseline="kl"))


def test_two_results_of_one_seed_are_refused(tmp_path):
    for tag in ("00000000", "11111111"):
        measure(make_run(tmp_path, tag=tag))
    with pytest.raises(ValueError, match=r"two results of seed 0 with the same recipe, mlp-kl-tiny-s0-00000000 and"):
        build_table(find_runs(str(tmp_path / "*")), Layout())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rows": ["draft", "optimizer.l"]}, r"'optimizer\.l' is neither .* did you mean optimizer\.lr"),
        ({"where": {"temperature": 0.5}}, r"where\.temperature=0\.5 leaves nothing; the runs have 0, 1"),
        ({"value": "taus"}, r"value: expected one of tau, .*, got 'taus'"),
        ({"value": "speedup"}, r"value=speedup: none of the 12 runs holds it"),
        ({"rows": ["draft"], "columns": ["draft"]}, "none in both"),
        ({"mean": "seed"}, r"mean=seed: expected one of the columns"),
        ({"baseline": {"seed": 0}}, r"baseline: expected keys of rows"),
        ({"confidence": 95}, "confidence: expected a share between 0 and 1, got 95"),
        ({"paper": "9"}, r"has no loss|numbers have no loss"),
        ({"rows": ["draft", "objective"], "paper": "9"}, r"paper: expected one of '1', .*got '9'"),
    ],
)
def test_options_that_make_no_sense_are_refused(study, options, told):
    with pytest.raises(ValueError, match=told):
        build_table(study, Layout(**options))


# --- what is missing, and the caption


def test_a_missing_run_shows_the_command_that_trains_it(tmp_path):
    measure(
        make_run(tmp_path, overrides=["experiment=drafts", "draft=mlp", "loss=kl", "loss.x=1", "on_existing=replace"])
    )
    measure(make_run(tmp_path, draft="medusa", loss="lk_lambda"))
    table = build_table(find_runs(str(tmp_path / "*")), Layout(baseline="kl", expect={"loss": ["kl", "tv"]}))
    missing = cell(table, "mlp tv", "1 mini_chat")
    assert missing.estimate is None
    (number,) = missing.missing
    assert table.commands[number - 1] == "lkspec train experiment=drafts draft=mlp loss=tv seed=0"
    base = cell(table, "medusa kl", "1 mini_chat")
    assert table.commands[base.missing[0] - 1] == "lkspec train draft=medusa loss=kl seed=0"


def test_a_missing_objective_has_the_settings_of_the_runs_that_have_it(tmp_path):
    """Also where a label does not tell whose a setting is: eta belongs to the base here."""
    base = {"_target_": "lkspec.losses.objectives.LKLambda", "eta": 10.0}
    measure(make_run(tmp_path, draft="eagle3", loss="greedy_mixed", arguments={"base": base, "share": 0.2}))
    measure(make_run(tmp_path, draft="medusa", loss="lk_lambda", arguments={"eta": 10.0, "fixed_lambda": None}))
    measure(make_run(tmp_path, draft="mlp"))
    labels = ["greedy_mixed_LKLambda_eta_10_share_0.2", "lk_lambda_eta_10"]
    table = build_table(
        find_runs(str(tmp_path / "*")), Layout(rows=["draft", "objective"], expect={"objective": labels})
    )
    told = [table.commands[cell(table, f"mlp {label}", "1 mini_chat").missing[0] - 1] for label in labels]
    of_base = f"loss.base._target_={base['_target_']} loss.base.eta=10"
    assert told[0] == f"lkspec train draft=mlp loss=greedy_mixed {of_base} loss.share=0.2 seed=0"
    assert told[1] == "lkspec train draft=mlp loss=lk_lambda loss.eta=10 seed=0"


def test_no_command_walks_further_than_a_run_was_validated(tmp_path):
    walk_held_out(make_run(tmp_path, tag="00000002", config={"vocab": {"size": 8}}), depths=2)
    walk_held_out(make_run(tmp_path))
    layout = Layout(rows=["vocab.size"], columns=["temperature", "num_draft_tokens"], value="walk")
    table = build_table(find_runs(str(tmp_path / "*")), layout)
    assert cell(table, "64", "1 3").estimate is not None
    assert cell(table, "8", "1 3").missing == ()
    assert table.commands == ()


def test_a_missing_measurement_shows_the_command_that_measures_it(tmp_path):
    first, second = make_run(tmp_path), make_run(tmp_path, loss="tv")
    for benchmark in ("mini_chat", "mini_code"):
        measure(first, benchmark=benchmark)
        measure(first, benchmark=benchmark, temperature=0.0)
    measure(second)
    table = build_table(find_runs(str(tmp_path / "*")), Layout(baseline="kl"))
    assert [cell(table, "mlp tv", name).missing for name in ("0 mini_chat", "0 mini_code", "1 mini_code")] == [(1,)] * 3
    _, verb, *arguments = shlex.split(table.commands[0])
    assert (verb, len(table.commands)) == ("evaluate", 1)
    assert arguments == [
        f"run={second.path}",
        "benchmark=[mini_chat,mini_code]",
        "temperatures=[0,1]",
        "num_draft_tokens=[3]",
    ]


def test_the_caption_says_what_the_intervals_hold(study):
    one = [run for run in study if run.config["seed"] == 0]
    alone = " ".join(build_table(one, Layout(baseline="kl")).caption)
    assert "one seed, so the intervals hold the spread over prompts only" in alone
    several = " ".join(build_table(study, Layout(baseline="kl")).caption)
    assert "spread over seeds and over prompts" in several
    assert "Seeds: 0, 1, 2. Prompts: mini_chat 12, mini_code 12. K = 3. Target: tiny." in several
    assert "of 8 gains, 0.4 would by chance alone" in several
    assert "Smallest visible effect" in several


def test_the_caption_names_what_else_sets_a_row_apart(tmp_path):
    measure(make_run(tmp_path))
    measure(make_run(tmp_path, loss="tv", config={"optimizer": {"lr": 0.002}}))
    caption = build_table(find_runs(str(tmp_path / "*")), Layout(baseline="kl")).caption
    assert "mlp, tv differs from mlp, kl also in optimizer.lr 0.001 -> 0.002." in caption


# --- the paper's numbers


def test_the_papers_numbers_stand_beside_ours(tmp_path):
    for benchmark in ("mt_bench", "humaneval"):
        measure(make_run(tmp_path / benchmark, draft="eagle3"), benchmark=benchmark)
    run = find_runs(str(tmp_path / "mt_bench" / "*"))
    layout = Layout(rows=["draft", "objective"], baseline="kl", paper="1", where={"num_draft_tokens": "max"})
    table = build_table(run, layout)
    theirs = cell(table, "eagle3 lk_lambda_eta_3", "1 humaneval", "paper")
    assert theirs.estimate.value == 4.52
    assert theirs.gain.value == pytest.approx(4.52 - 4.31)
    assert not theirs.is_resolved
    assert cell(table, "eagle3 kl", "1 mt_bench", "paper").estimate.value == 3.39
    assert cell(table, "eagle3 kl", "1 mt_bench").estimate is not None
    wanted = cell(table, "medusa lk_lambda_eta_10", "1 mt_bench")
    assert table.commands[wanted.missing[0] - 1].endswith("draft=medusa loss=lk_lambda loss.eta=10 seed=0")
    assert any("arXiv 2602.23881" in sentence and "Llama-3.1-8B-Instruct" in sentence for sentence in table.caption)


def test_the_papers_targets_are_not_ours_to_fill(tmp_path):
    measure(make_run(tmp_path, draft="eagle3"), benchmark="mt_bench")
    layout = Layout(rows=["target", "draft", "objective"], value=["tau", "speedup"], baseline="kl", paper="4")
    table = build_table(find_runs(str(tmp_path / "*")), layout)
    assert {row.labels[0] for row in table.rows if row.source == "ours"} == {"tiny"}
    public = cell(table, "Qwen3-235B-A22B-Instruct-2507 eagle3 kl", "1 gsm8k speedup", "paper")
    assert public.estimate.value == 2.5
    alone = cell(table, "tiny eagle3 kl", "1 mt_bench speedup")
    assert table.commands[alone.missing[0] - 1].endswith("batch_size=1")


@pytest.mark.parametrize(
    ("loss", "arguments", "text"),
    [
        ("kl", {}, "kl"),
        ("lk_lambda", {"eta": 3.0, "per_token": False}, "lk_lambda_eta_3"),
        ("lk_lambda", {"eta": 0.7}, "lk_lambda_eta_0.7"),
        ("lk_lambda_fixed", {"fixed_lambda": 0.5}, "lk_lambda_fixed_0.5"),
    ],
)
def test_objectives_have_the_papers_names_and_lead_back_to_overrides(loss, arguments, text):
    assert objective_label(loss, arguments) == text
    numbers = {key: value for key, value in arguments.items() if not isinstance(value, bool)}
    assert published_overrides(text) == [f"loss={loss}", *(f"loss.{key}={value:g}" for key, value in numbers.items())]


def test_an_objective_that_wraps_another_names_its_class():
    base = {"_target_": "lkspec.losses.objectives.LKAlpha"}
    assert objective_label("filter_aware", {"base": base, "top_k": 0, "top_p": 0.9}) == (
        "filter_aware_LKAlpha_top_k_0_top_p_0.9"
    )
    assert objective_label("mine", {"base": {"_target_": "my.LKLambda", "eta": 3.0}}) == "mine_LKLambda_eta_3"


def test_etas_of_one_objective_have_labels_of_their_own():
    assert objective_label("lk_lambda", {"eta": 10.0}) == "lk_lambda_eta_10"
    assert objective_label("expected_length_lambda", {"eta": 10.0}) == "expected_length_lambda_eta_10"
