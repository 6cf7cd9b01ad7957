"""Names of activations."""

import re

import pytest

from mechdiff.errors import SiteError
from mechdiff.interventions.sites import COMPONENTS, Site, check_layers

ALLOWED = "; allowed: <component>.<layer>, component one of resid_post, attn_out, mlp_out, head_z, head_out"
KEY = " (key: layers)"


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layer", [0, 12, 127])
def test_a_site_prints_as_it_parses(component: str, layer: int) -> None:
    site = Site(layer, component)
    assert str(site) == f"{component}.{layer}"
    assert Site.parse(str(site)) == site
    assert Site.parse(site) is site
    assert Site.parse(f" {site}\n") == site


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resid_post",
        "resid_post.",
        "resid_post.-1",
        "resid_post.1.5",
        "resid_pre.3",
        "3",
        ".3",
        "Resid_post.3",
        "resid_post.3x",
        "resid_post 3",
        "resid_post.²",
    ],
)
def test_an_unknown_site_is_refused(text: str) -> None:
    with pytest.raises(SiteError, match=f"^{re.escape(f'unknown site {text!r}{ALLOWED}{KEY}')}$"):
        Site.parse(text)


def test_sites_are_ordered_by_layer() -> None:
    names = ["resid_post.2", "attn_out.10", "resid_post.10", "mlp_out.2"]
    ordered = sorted(map(Site.parse, names))
    assert [str(s) for s in ordered] == ["mlp_out.2", "resid_post.2", "attn_out.10", "resid_post.10"]
    assert len({Site(1), Site(1), Site(1, "mlp_out")}) == 2


@pytest.mark.parametrize("layer", [-1, 4, 400])
def test_a_layer_out_of_range_names_the_range_and_the_key(layer: int) -> None:
    message = f"site resid_post.{layer} is out of range; allowed layers: 0 to 3 (key: layers)"
    with pytest.raises(SiteError, match=f"^{re.escape(message)}$"):
        check_layers([Site(0), Site(layer)], 4)


def test_layers_in_range_pass() -> None:
    check_layers([Site(0), Site(3, "head_z")], 4)
    with pytest.raises(SiteError, match=r"\(key: data\.sites\)$"):
        check_layers([Site(4)], 4, key="data.sites")
