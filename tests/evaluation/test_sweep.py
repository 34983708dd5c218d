"""A model at many sizes, measured once; a sweep that was stopped goes on."""

import pytest
from support.command_line import casp, error_of

from casp_plugin import CompressionPlan
from casp_plugin.evaluation.records import load_records
from casp_plugin.evaluation.results import Evaluation, Measurement
from casp_plugin.evaluation.study_folder import begin
from casp_plugin.evaluation.sweep_points import Point, finished, frontier_table

UNIFORM = """
uniform_stage:
  uniform_modifiers:
    QuantizationModifier: {targets: [Linear], scheme: W8A8, ignore: [lm_head]}
"""
METRICS = ["perplexity", "kl", "top1_agreement"]


def arguments(tiny_llama, files, *more):
    (recipe,) = files.glob("recipe*.yaml")
    return [
        "sweep", tiny_llama, "--recipe", recipe, "--dataset", files / "data.jsonl",
        "--heldout", files / "data.jsonl", "--max-length", 32, "--output", files / "sweep", *more,
    ]  # fmt: skip


def point(name, bytes_=1, value=2.0):
    shares = {"metric": "perplexity", "task": "t", "value": value, "low": 1.5, "high": 2.5}
    found = Evaluation(model=name, settings={}, versions={}, measurements=[Measurement(**shares)])
    return Point(name=name, bytes=bytes_, evaluation=found)


def test_sizes_of_one_model(tiny_llama, files, monkeypatch):
    import casp_plugin.statistics.layer_by_layer as measuring

    collected = []
    collect = measuring.collect_sections
    monkeypatch.setattr(
        measuring, "collect_sections", lambda *args: collected.append(1) or collect(*args)
    )
    (files / "uniform.yaml").write_text(UNIFORM)
    (files / "recipe.yaml").rename(files / "recipe_5.yaml")
    more = ["--recipe", files / "uniform.yaml", "--average-bits", "4", "5,6"]
    result = casp(*arguments(tiny_llama, files, *more))
    assert result.exit_code == 0, result.output
    assert len(collected) == 1
    points = load_records(Point, files / "sweep" / "sweep.json", "casp sweep")
    names = ["recipe_4", "recipe_5", "recipe_6", "uniform"]
    assert [each.name for each in points] == [tiny_llama, *names]
    for each, bits in zip(points[1:4], (4, 5, 6), strict=True):
        plan = CompressionPlan.load(files / "sweep" / each.name)
        assert plan.average_bits == bits
        assert bits - 0.02 <= each.average_bits <= bits
        assert each.bytes == (files / "sweep" / each.name / "model.safetensors").stat().st_size
        assert [one.metric for one in each.evaluation.measurements] == METRICS
    assert [each.bytes for each in points[1:4]] == sorted(each.bytes for each in points[1:4])
    kl = [each.evaluation.measurements[1].value for each in points[1:4]]
    assert kl == sorted(kl, reverse=True)
    assert points[0].average_bits is points[4].average_bits is None
    assert (files / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    rows = (files / "sweep" / "sweep.md").read_text().strip().splitlines()
    assert len(rows) == 2 + len(points) + 2
    assert "seed 0; casp-plugin" in rows[-1]
    assert all(name in row for name, row in zip(names, rows[3:-2], strict=True))

    result = casp(*arguments(tiny_llama, files, "--average-bits", "4.5"))  # one more, later
    assert result.exit_code == 0, result.output
    assert len(collected) == 1
    rows = (files / "sweep" / "sweep.md").read_text().strip().splitlines()
    assert "recipe_4.5" in rows[4]
    assert len(rows) == 3 + len(points) + 2


def test_caches_beside_sizes(tiny_llama, files):
    """Each size is scored with each cache; the checkpoint is the same."""
    caches = ["kcvt:bits=8,g=4", "kcvt:bits=2,g=4"]
    more = [word for each in caches for word in ("--kv-cache", each)]
    result = casp(*arguments(tiny_llama, files, "--average-bits", "4", *more))
    assert result.exit_code == 0, result.output
    points = load_records(Point, files / "sweep" / "sweep.json", "casp sweep")
    models = [tiny_llama, "recipe_4"]
    labels = [name + cache for name in models for cache in ("", *(f", {c}" for c in caches))]
    assert sorted(point.name for point in points) == sorted(labels)
    found = {point.name: point for point in points}
    kept = [found[f"recipe_4{cache}"] for cache in ("", f", {caches[0]}", f", {caches[1]}")]
    assert len({(point.bytes, point.average_bits) for point in kept}) == 1
    assert len({point.series for point in kept}) == 3
    kl = [point.evaluation.measurements[1].value for point in kept]
    assert kl[1] == pytest.approx(kl[0], rel=0.1)
    assert kl[2] != pytest.approx(kl[0], rel=1e-3)
    assert list((files / "sweep").glob("recipe_4*")) == [files / "sweep" / "recipe_4"]


def test_stopped_sweeps_go_on(tmp_path):
    made = []

    def make(name):
        def run():
            made.append(name)
            if name == "c" and made.count("c") == 1:
                raise KeyboardInterrupt
            return point(name)

        return run

    wanted = {name: make(name) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        finished(tmp_path, wanted)
    assert [each.name for each in finished(tmp_path, wanted)] == ["a", "b", "c"]
    assert made == ["a", "b", "c", "c"]
    assert [each.name for each in finished(tmp_path, {"a": wanted["a"]})] == ["a", "b", "c"]
    again = {"b": lambda: point("b"), "d": lambda: point("d", bytes_=0)}
    assert [each.name for each in finished(tmp_path, again)] == ["a", "d", "b", "c"]  # by size


def test_folders_of_something_else(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("a: 1")
    begin(tmp_path / "s", {"samples": 4}, [recipe])
    begin(tmp_path / "s", {"samples": 4}, [recipe])
    with pytest.raises(ValueError, match=r"made otherwise \(samples was 4\)"):
        begin(tmp_path / "s", {"samples": 5}, [recipe])
    recipe.write_text("a: 2")
    with pytest.raises(ValueError, match="another recipe"):
        begin(tmp_path / "s", {"samples": 4}, [recipe])
    with pytest.raises(ValueError, match=r"neither empty nor the folder of a sweep"):
        begin(tmp_path, {"samples": 4}, [recipe])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--average-bits", "1.5"], "1.5 cannot be reached"),
        (["--average-bits", "three"], "--average-bits three: numbers are needed"),
        (["--average-bits", "4", "--text-column", "body"], "has no column 'body'"),
        (["--average-bits", "4", "--heldout", "nowhere.jsonl"], "cannot read dataset"),
        (["--average-bits", "4", "--max-length", "1"], None),
    ],
)
def test_errors_before_anything_is_written(tiny_llama, files, capsys, monkeypatch, more, message):
    if message is None:
        assert casp(*arguments(tiny_llama, files, *more)).exit_code == 2
    else:
        found = error_of(capsys, monkeypatch, *arguments(tiny_llama, files, *more))
        assert message in found
    assert not (files / "sweep").exists()


def test_budgets_of_components(tiny_llama, files, capsys, monkeypatch):
    path = files / "recipe.yaml"
    path.write_text(path.read_text().replace("average_bits: 5", "average_bits: {language: 5}"))
    found = error_of(capsys, monkeypatch, *arguments(tiny_llama, files, "--average-bits", "4"))
    assert "average_bits has a budget for each component (language)" in found


def test_table_is_markdown(capsys):
    from rich.console import Console

    Console(width=120).print(frontier_table([point("a", 1000), point("b", 500, 3.25)]))
    lines = [line.strip() for line in capsys.readouterr().out.strip().splitlines()]
    assert lines[1].replace("-", "").replace("|", "").replace(":", "").strip() == ""
    assert "1,000" in lines[2]
    assert "3.25 [1.5, 2.5]" in lines[3]
