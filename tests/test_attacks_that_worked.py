"""The attacks of an audit that once worked, and the test that repeats each.

An enemy may publish erasers, files, archives and registries; SECURITY.md says who may do what.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

ATTACKS: dict[str, tuple[str, ...]] = {
    "a signed eraser is served under another's name, or an older version of it": (
        "hub/test_signatures.py::test_a_signed_snoopy_that_is_served_as_violence_is_refused_and_both_are_named",
        "hub/test_signatures.py::test_an_older_signed_version_is_refused",
    ),
    "an alias takes the name of a safety eraser": ("hub/test_bare_names.py::test_an_alias_is_no_name",),
    "a typo of a held name is pulled from a stranger": (
        "hub/test_bare_names.py::test_a_typo_of_a_held_name_is_refused_before_any_request",
    ),
    "an eraser takes back another, adds its concept, or never acts on it": (
        "attachment/test_objections.py::test_an_eraser_that_undoes_another_is_refused_by_name",
        "hub/test_convert_and_bake.py::test_an_eraser_that_undoes_another_is_not_baked_with_it",
        "cli/test_eval_command.py::test_erasers_that_undo_each_other_are_refused_before_a_picture_is_drawn",
        "hub/test_limits.py::test_a_manifest_beyond_the_limits",
        "hub/test_audit.py::test_what_attackers_built_is_found",
        "hub/test_audit.py::test_an_eraser_that_adds_its_concept_is_found_without_the_honest_one",
    ),
    "an old pickle in front of a good archive": (
        "io/test_hostile_pickles.py::test_a_pickle_in_front_of_a_zip_is_not_read",
    ),
    "a manifest's texts become commands, code or headings of the card": (
        "hub/test_card_hostile.py::test_the_card_of_a_hostile_manifest_has_the_structure_of_an_honest_one",
        "hub/test_card_hostile.py::test_a_base_that_is_no_reference_is_not_put_into_a_command",
    ),
    "a few lines of YAML unfold into gigabytes": ("io/test_small_files.py::test_recipes_have_no_anchors",),
    "thousands of aliases": (
        "hub/test_limits.py::test_a_manifest_beyond_the_limits",
    ),
    "a lock file or journal that is a link, a device or endless": (
        "io/test_small_files.py::test_only_small_plain_files_are_read",
        "io/test_small_files.py::test_a_journal_is_not_read_through_a_link",
    ),
    "escapes, hidden characters and forged lines on a terminal and in JSON": (
        "hub/test_card_hostile.py::test_nothing_hidden_or_forged_reaches_a_terminal",
    ),
    "a manifest of another family than its tensors or the model": (
        "adapters/test_stated_families.py::test_both_families_are_named",
        "attachment/test_objections.py::test_another_family_than_the_models_is_refused_with_both",
    ),
    "a file is changed or cut after its check": (
        "io/test_small_files.py::test_a_change_after_the_check_has_no_effect",
    ),
    "a linked folder of a registry is written through": (
        "registry/test_trust.py::test_a_link_in_a_strangers_registry_leads_to_no_deletion",
        "io/test_small_files.py::test_nothing_is_written_through_a_link",
    ),
    "pictures and indices that end in a traceback": (
        "hub/test_hostile_pictures.py::test_pictures_that_are_none_are_a_sentence",
        "models/test_hostile_indices.py::test_an_odd_index_is_a_sentence",
        "models/test_hostile_indices.py::test_a_part_that_no_folder_can_hold_is_a_sentence",
    ),
    "headers of 100,000 tensors, and recipes of megabytes": (
        "io/test_small_files.py::test_headers_of_very_many_tensors_cost_little",
        "cli/test_keep_and_trust.py::test_a_recipe_of_megabytes_is_not_shown_but_counted",
    ),
    "a link in a baked checkpoint is copied as a file": (
        "adapters/test_baking.py::test_what_a_link_in_a_strangers_checkpoint_names_is_not_copied",
    ),
    "names that Windows keeps for devices": ("registry/test_registry.py::test_names_of_windows_devices_are_refused",),
    "the working folder's registry goes first": ("registry/test_registry.py::test_the_order_of_registries",),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_has_its_test(attack: str) -> None:
    for place in ATTACKS[attack]:
        file, _, name = place.partition("::")
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), place
