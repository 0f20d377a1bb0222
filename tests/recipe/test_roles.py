"""Roles: they print as they are parsed, and nothing else is one."""

from __future__ import annotations

import pytest

from kdpipe.recipe.roles import Role, RoleKind


@pytest.mark.parametrize("kind", RoleKind)
@pytest.mark.parametrize("name", ["", "expert", "baseline"])
def test_a_role_is_parsed_as_it_prints(kind: RoleKind, name: str) -> None:
    role = Role(kind, name)
    assert Role.parse(str(role)) == role


@pytest.mark.parametrize("text", ["", "teachers", "teacher:", ":expert", "teacher expert"])
def test_nothing_else_is_a_role(text: str) -> None:
    with pytest.raises(ValueError, match=r"role|RoleKind"):
        Role.parse(text)


def test_scores_and_text_belong_to_their_teacher() -> None:
    role = Role.parse("teacher:expert")
    assert str(role.as_kind(RoleKind.SCORES)) == "scores:expert"
    assert str(Role.parse("teacher").as_kind(RoleKind.TEXT)) == "text"
