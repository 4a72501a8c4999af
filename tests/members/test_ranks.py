"""Members that are spread over processes: all decode the same, and what one process decodes."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import oracle
import pytest
import tensor_parallel
import torch
from families import members, prompts

import hf_spec_ensemble as se
from hf_spec_ensemble.members import ranks


PROGRAM = tensor_parallel.__file__


@pytest.mark.slow
def test_tensor_parallel_members_decode_as_one_process_does(tmp_path):
    """Two processes, one of which is late at random, so that their measured times differ."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         PROGRAM, str(tmp_path / "texts")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"texts.{rank}").read_text()) for rank in range(2))
    expected = tensor_parallel.results()
    assert len(expected) == len(tensor_parallel.CASES) + 1
    for name, text in expected.items():
        assert first[name] == second[name] == text, name
        wanted = tensor_parallel.CASES[name.split()[1]]["max_new_tokens"]
        assert len(text[0]) == tensor_parallel.PROMPTS.shape[1] + wanted
    for name in first.keys() - expected.keys():  # ended by a clock
        assert first[name] == second[name], name
        assert len(first[name][0]) < 2000


def test_a_process_by_itself_agrees_with_itself():
    alone = ranks.ranks_of(members("llama", 2))
    values = torch.tensor([1.5, 2.0])
    assert type(alone) is ranks.Ranks
    assert alone.agree(values) is values
    assert alone.agree_on("this") == "this"
    before = torch.get_rng_state()
    alone.share_random_state(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


def test_pipeline_parallel_members_are_refused():
    class Mesh:
        ndim = 2

        def __init__(self, size):
            self._size = size

        def size(self):
            return self._size

        def __getitem__(self, name):
            return Mesh(1)

    with pytest.raises(ValueError, match="tensor-parallel, not pipeline-parallel"):
        ranks.ranks_of([SimpleNamespace(_device_mesh=Mesh(2))])


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)


def sharded(model, monkeypatch):
    monkeypatch.setattr(model, "_is_fsdp_managed_module", True, raising=False)


@pytest.mark.parametrize("which", [0, 1])
def test_sharded_members_are_refused(which, two_processes, monkeypatch):
    models = members("llama", 2)
    sharded(models[which], monkeypatch)
    for config in (se.EnsembleConfig(), se.EnsembleConfig(speculative=False))[: 1 + which]:
        with pytest.raises(ValueError, match=r"FSDP or ZeRO-3"):
            models[0].generate(**prompts(1), assistant_model=models[1], ensemble_config=config, max_new_tokens=4)
    assert ranks.is_sharded(models[which]) and not ranks.is_sharded(models[1 - which])


def test_a_sharded_main_model_goes_on_until_all_have_finished(two_processes, monkeypatch):
    """The standard ensemble hands `synced_gpus` to transformers' loop, also where nobody asked for it."""
    models, asked = members("llama", 2), []
    sharded(models[0], monkeypatch)

    def unfinished(this_peer_finished, synced_gpus, device):
        asked.append(synced_gpus)
        return not this_peer_finished

    monkeypatch.setattr(models[0], "_has_unfinished_sequences", unfinished)
    config = oracle.config_of("weighted", 2, speculative=False)
    models[0].generate(**prompts(1), assistant_model=models[1], ensemble_config=config, max_new_tokens=4)
    assert asked and all(asked)


def test_synced_gpus_is_refused_by_the_speculative_ensemble():
    models = members("llama", 2)
    with pytest.raises(ValueError, match="synced_gpus"):
        models[0].generate(
            **prompts(1), assistant_model=models[1], ensemble_config=se.EnsembleConfig(), synced_gpus=True
        )
