"""Two processes against one: gloo on this machine's CPU."""

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        # Means over tokens, stages of which the first reach no head, weight decay meanwhile.
        ("internal", {"schedule": "stacked", "cosine_rows": "tokens"}),
        # Outputs other than logits, a pooler that no loss reaches.
        pytest.param("embedding", {}, marks=pytest.mark.exhaustive),
        # Losses that couple samples, a memory, parameters of the recipe's own.
        (
            "custom",
            {
                "losses": [
                    {"loss": "local"},
                    {"loss": "global", "clusters": 4, "weight": 0.1},
                    {"loss": "rkd_angle"},
                    {"loss": "hidden_cka"},
                    {"loss": "pseudo_projection"},
                ]
            },
        ),
    ],
)
def test_two_processes_train_what_one_trains_on_the_joined_batch(
    recipe, options, trained_in_processes
):
    for processes in (1, 2):
        trained_in_processes(
            processes,
            recipe=recipe,
            recipe_options=options,
            per_device_train_batch_size=8 // processes,
        )
    trained_in_processes.agree("model", *["kdfast_state"] * (recipe != "embedding"))
