"""What ``import compofa`` offers, and the imports that stay whatever moves."""

import subprocess
import sys

import pytest

import compofa


@pytest.mark.parametrize("name", compofa.__all__)
def test_names_are_there_and_listed(name: str) -> None:
    assert getattr(compofa, name) is not None
    assert name in dir(compofa)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="ofa_nett"):
        compofa.ofa_nett  # noqa: B018


def test_importing_takes_no_torch_and_names_come_when_asked_for() -> None:
    code = (
        "import sys, compofa\n"
        "assert 'numpy' not in sys.modules\n"
        "assert compofa.list_networks('digits') == ['compofa-digits']\n"
        "assert compofa.SearchSpace and compofa.Subnet and 'torch' not in sys.modules\n"
        "assert compofa.ofa_net('compofa-small', classes=3) and 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_networks_are_listed() -> None:
    found = compofa.list_networks()
    assert {"compofa", "note10_lat@8ms_top1@71.4_finetune@25"} <= set(found)
    assert len(found) == len(set(found)) > 60


def test_imports_of_published_programs_and_of_the_readme_stay() -> None:
    from compofa import checkpoint, model_zoo

    assert model_zoo.ofa_net is compofa.ofa_net
    assert model_zoo.ofa_specialized is compofa.ofa_specialized
    assert checkpoint.load_weights is compofa.load_weights
