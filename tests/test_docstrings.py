"""The examples in the docstrings of the stages run as they stand, alone and one after the other, without pipelines."""

import textwrap

import torch

import stage1_vae
import stage2_prior
from tests.forks import forked

CODE = {
    stage: "\n".join(line for line in stage.__doc__.split("\n") if line.startswith("    ") or not line)
    for stage in (stage1_vae, stage2_prior)
}


def run(stage, changed=lambda code: code, **names) -> dict:
    torch.manual_seed(0)
    code = textwrap.dedent(CODE[stage])
    exec(changed(code), names)
    return names


def test_the_example_of_a_stage_runs_alone():
    found = run(stage1_vae)
    assert found["again"].shape == found["images"].shape and found["again"].dtype == torch.uint8
    assert [tuple(level["codes"].shape) for level in found["posteriors"]] == [(64, 7, 7)]
    found = run(stage2_prior)
    assert all(tuple(drawn.shape) == (8, 7, 7) for drawn in found["drawn"] + found["clearer"])
    assert found["nats"].shape == (8,) and not torch.equal(found["drawn"][0], found["clearer"][0])


def test_the_example_of_stage_2_runs_on_latents_of_that_of_stage_1():
    first = run(stage1_vae)
    given = 'posteriors = [{"codes": torch.randint(64, (64, 7, 7))}]'
    spec, specs = "specs = [LatentSpec((7, 7), vocabulary=64)]", "specs = [LatentSpec(*level) for level in vae.latents]"

    def joined(code: str) -> str:
        assert given in code and spec in code and specs.removeprefix("specs = ") in code
        return code.replace(given, "").replace(spec, specs)

    second = run(stage2_prior, joined, vae=first["vae"], posteriors=first["posteriors"])
    assert first["vae"].render(second["drawn"]).shape == (8, 1, 28, 28)


def test_the_examples_import_no_pipelines(tmp_path):
    imports = [line for code in CODE.values() for line in textwrap.dedent(code).split("\n") if "import " in line]
    check = "import sys; assert not any(name.split('.')[0] == 'pipelines' for name in sys.modules)"
    (tmp_path / "imports.py").write_text("\n".join([*imports, check]))
    done = forked("imports", cwd=tmp_path, anew=True)
    assert done.returncode == 0, done.stderr
