"""Distillation of value models, against plain computations over every branch alone."""

import pytest
import torch
from transformers import TrainerCallback

from trimtab.plugins.value_model import MAVISValueModel
from trimtab.trainers import MAVISDistillationConfig, MAVISDistillationTrainer
from trimtab.trainers.candidates import candidate_differences
from trimtab.trainers.rollouts import TreeConfig

from .conftest import END, make_model, make_tokenizer
from .test_rollouts import grow

K = 6


@pytest.fixture(scope="module")
def trees():
    return grow(TreeConfig(max_completion_length=14, layers=3), end=0.1, count=12)


def value_model(base_model, objectives, seed=1, tokenizer=None, layers=2, **fields):
    model = MAVISValueModel.from_base_model(
        base_model, objectives, num_hidden_layers=layers,
        tokenizer=tokenizer or make_tokenizer(), **fields,
    )  # fmt: skip
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def trainer(base_model, folder, teachers, train, student=None, **fields):
    arguments = {k: fields.pop(k) for k in ("eval_dataset", "callbacks") if k in fields}
    config = MAVISDistillationConfig(
        str(folder),
        **{
            "num_hidden_layers": 2,
            "action_rank": 8,
            "top_k": K,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "learning_rate": 3e-3,
            "head_learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "positions_per_sequence": 1000,
            "leaf_fraction": 1.0,
            **fields,
        },
    )
    return MAVISDistillationTrainer(
        base_model if student is None else student, teachers, config, train, **arguments
    )


def branches(sequence):
    """Every position of a packed tree with the tokens of its prefix."""
    for end in range(len(sequence["input_ids"])):
        index, prefix = end, []
        while True:
            prefix.append(int(sequence["input_ids"][index]))
            if sequence["position_ids"][index] == 0:
                break
            index = sequence["previous"][index]
        yield end, prefix[::-1]


def plain(model, prefix, candidates):
    """Values of the prefix and of its candidates, without a tree."""
    with torch.inference_mode():
        if model.config.head_type == "state":
            full = torch.tensor([[*prefix, a] for a in candidates])
            logits = model(full).logits
            return logits[0, -2], logits[:, -1]
        output = model(torch.tensor([prefix]), candidates=torch.tensor([[candidates]] * 1),
                       candidate_positions=torch.tensor([[len(prefix) - 1]]))  # fmt: skip
        return output.logits[0, -1], output.candidate_logits[0, 0]


def candidates_of(sequence):
    """Every prefix with candidates: its tokens, its candidates and their log-probabilities."""
    prefixes = dict(branches(sequence))
    for i, position in enumerate(sequence["candidate_positions"]):
        log_probs = torch.from_numpy(sequence["candidate_log_probs"][i])
        yield prefixes[position], sequence["candidates"][i].tolist(), log_probs


def test_candidates_are_the_base_models_after_every_prefix(base_model, trees, tmp_path):
    made = trainer(base_model, tmp_path, value_model(base_model, ["a"]), trees)
    made.add_candidates()
    base = make_model()
    for sequence in made.train_dataset.sequences[:4]:
        for prefix, candidates, log_probs in candidates_of(sequence):
            top, expected = base(torch.tensor([prefix])).logits[0, -1].topk(K)
            assert candidates == expected.tolist()
            torch.testing.assert_close(log_probs, top.log_softmax(-1), atol=1e-4, rtol=1e-4)
        # The prompts have 3 tokens; nothing follows the end.
        expected = [e for e, p in branches(sequence) if len(p) >= 3 and p[-1] != END]
        assert sequence["candidate_positions"].tolist() == expected


def test_student_has_the_scales_of_its_teachers(base_model, trees, tmp_path):
    teachers = [
        value_model(base_model, ["a", "b"]),
        value_model(base_model, ["c"], candidate_scale=[0.5]),
    ]
    made = trainer(base_model, tmp_path, teachers, trees)
    assert made.model.config.candidate_scale == [1.0, 1.0, 0.5]
    student = value_model(base_model, ["a", "b"], candidate_scale=[0.1, 0.2])  # of other values
    made = trainer(base_model, tmp_path, teachers[0], trees, student)
    assert made.model.config.candidate_scale is None


def test_some_prefixes_are_drawn_and_the_same_again(base_model, trees, tmp_path):
    drawn = []
    for _ in range(2):
        made = trainer(
            base_model, tmp_path, value_model(base_model, ["a"]), trees, positions_per_sequence=5
        )
        made.add_candidates()
        made.add_candidates()
        drawn.append([s["candidate_positions"].tolist() for s in made.train_dataset.sequences])
    assert drawn[0] == drawn[1] and {len(set(d)) for d in drawn[0]} == {5}
    assert len(set(map(tuple, drawn[0]))) > 6


@pytest.mark.parametrize("head_type", ["state", "action"])
def test_loss_is_that_of_a_plain_computation(base_model, trees, tmp_path, monkeypatch, head_type):
    # The teachers read the candidates of a few prefixes at once.
    monkeypatch.setattr("trimtab.trainers.candidates.PART_POSITIONS", 5)
    teachers = [
        value_model(base_model, ["a", "b"], seed=1),
        value_model(base_model, ["c"], seed=2, layers=1),
    ]
    student = value_model(base_model, ["a", "b", "c"], seed=3, head_type=head_type)
    made = trainer(
        base_model, tmp_path, teachers, trees, student,
        uniform_weight=0.3, value_weight=0.7,
    )  # fmt: skip
    made.add_candidates()
    made.model.eval()
    sequences = made.train_dataset.sequences[:3]
    with torch.inference_mode():
        loss = made.compute_loss(made.model, made.data_collator(sequences))
    differences, values = [], []
    for sequence in sequences:
        for prefix, candidates, log_probs in candidates_of(sequence):
            weights = 0.3 / K + 0.7 * log_probs.exp()
            q = torch.cat([plain(teacher, prefix, candidates)[1] for teacher in teachers], -1)
            error = plain(student, prefix, candidates)[1] - q
            mean = (weights[:, None] * error).sum(0)
            differences.append((weights[:, None] * (error - mean) ** 2).sum(0))
        for _, prefix in branches(sequence):
            if len(prefix) > 3:
                v = torch.cat([plain(teacher, prefix, [1])[0] for teacher in teachers], -1)
                values.append((plain(student, prefix, [1])[0] - v) ** 2)
    expected = torch.stack(differences).mean() + 0.7 * torch.stack(values).mean()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=2e-3)
    metrics = made._metrics["eval"].compute(made.accelerator)
    assert metrics["difference_loss"] == pytest.approx(
        float(torch.stack(differences).mean()), rel=2e-3
    )


def test_student_recovers_a_teacher_that_it_can_express(base_model, trees, tmp_path):
    teacher = value_model(base_model, ["a", "b"], head_type="action", action_rank=3)
    made = trainer(
        base_model, tmp_path, teacher, trees, eval_dataset=trees,
        num_train_epochs=60, action_rank=16, head_learning_rate=1e-2,
    )  # fmt: skip
    made.train()
    metrics = made.evaluate()
    for name in ("a", "b"):
        assert metrics[f"eval_difference_explained_variance/{name}"] > 0.9
        assert metrics[f"eval_top_candidate_agreement/{name}"] > 0.7


def test_an_untrained_student_explains_nothing(base_model, trees, tmp_path):
    teacher = value_model(base_model, ["a"])
    metrics = trainer(base_model, tmp_path, teacher, trees, eval_dataset=trees).evaluate()
    assert metrics["eval_difference_explained_variance/a"] == pytest.approx(0, abs=1e-6)


def test_several_teachers_make_one_student_of_all_their_objectives(base_model, trees, tmp_path):
    teachers = [value_model(base_model, [name], seed) for seed, name in enumerate("cab")]
    for i, teacher in enumerate(teachers):
        teacher.config.reward_mean, teacher.config.reward_std = [float(i)], [i + 1.0]
        teacher.config.top_k = 4 + i
        teacher.save_pretrained(tmp_path / str(i))
    paths = [str(tmp_path / str(i)) for i in range(3)]
    made = trainer(base_model, tmp_path / "student", paths, trees, top_k=None)
    made.train()
    made.save_model()
    student = MAVISValueModel.load(str(tmp_path / "student"))
    assert student.config.objectives == ["c", "a", "b"]
    assert student.config.reward_mean == [0, 1, 2] and student.config.reward_std == [1, 2, 3]
    assert student.config.head_type == "action" and student.config.top_k == 6
    assert student.config.tokenizer_fingerprint == teachers[0].config.tokenizer_fingerprint
    assert [t["name"] for t in student.config.provenance["teachers"]] == paths


@pytest.mark.parametrize("layers", [1, 2])
def test_student_starts_from_an_equal_teacher_or_the_base_model(
    base_model, trees, tmp_path, layers
):
    teacher = value_model(base_model, ["a"])
    torch.nn.init.normal_(teacher.backbone.norm.weight)
    student = trainer(base_model, tmp_path, teacher, trees, num_hidden_layers=layers).model
    same = layers == 2
    assert torch.equal(student.backbone.norm.weight, teacher.backbone.norm.weight) is same
    assert torch.equal(student.head.weight, teacher.head.weight) is same
    assert teacher.backbone.norm.weight.requires_grad is False
    assert student.backbone.norm.weight.requires_grad
    assert not student.get_input_embeddings().weight.requires_grad


def test_heads_have_a_learning_rate_of_their_own(base_model, trees, tmp_path):
    made = trainer(
        base_model, tmp_path, value_model(base_model, ["a"]), trees, head_learning_rate=0.0
    )
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    torch.nn.init.normal_(made.model.action_query.weight)
    before["action_query.weight"] = made.model.action_query.weight.clone()
    made.train()
    changed = {k for k, v in made.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(name.startswith("backbone.layers") for name in changed - {
        "backbone.norm.weight"})  # fmt: skip


def test_candidate_range_is_the_largest_difference(base_model, trees, tmp_path):
    teacher = value_model(base_model, ["a", "b"])
    made = trainer(base_model, tmp_path, teacher, trees)
    made.train()
    expected = []
    for sequence in made.train_dataset.sequences:
        for prefix, candidates, _ in candidates_of(sequence):
            values = plain(made.model.eval(), prefix, candidates)[1]
            expected.append(values.amax(0) - values.amin(0))
    found = candidate_differences(made.model, made.train_dataset.sequences, made.data_collator)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=1e-4)
    assert made.model.config.candidate_range == pytest.approx(found.amax(0).tolist(), rel=1e-4)


def test_frozen_backbone_keeps_the_teachers_values(base_model, trees, tmp_path):
    teacher = value_model(base_model, ["a"])
    made = trainer(base_model, tmp_path, teacher, trees, freeze_backbone=True, value_weight=0.0)
    made.train()
    made.model.eval()
    ids = torch.tensor([trees[0].nodes[0].tokens])
    assert torch.equal(made.model(ids).logits, teacher(ids).logits)
    assert made.model.action_query.weight.abs().max() > 0


def test_interrupted_distillation_resumes_from_its_checkpoint(base_model, trees, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    teacher = value_model(base_model, ["a"])
    fields = {
        "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2,
        "positions_per_sequence": 3,
    }  # fmt: skip
    trainer(base_model, tmp_path / "a", teacher, trees, callbacks=[Stop()], **fields).train()
    resumed = trainer(base_model, tmp_path / "a", teacher, trees, **fields)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(base_model, tmp_path / "b", teacher, trees, **fields)
    whole.train()
    assert resumed.state.global_step == whole.state.global_step == 6
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())


class TestBadInput:
    def test_teacher_of_another_tokenizer(self, base_model, trees, tmp_path):
        other = make_tokenizer()
        other.add_tokens(["new"])
        teacher = value_model(base_model, ["a"], tokenizer=other)
        with pytest.raises(ValueError, match=r"teacher for \['a'\] was made for another tokenizer"):
            trainer(base_model, tmp_path, teacher, trees)

    def test_teachers(self, base_model, trees, tmp_path):
        with pytest.raises(ValueError, match="`teachers` is empty"):
            trainer(base_model, tmp_path, [], trees)
        teachers = [value_model(base_model, ["a"]), value_model(base_model, ["b", "a"])]
        with pytest.raises(ValueError, match=r"one name.*\['a', 'b', 'a'\]"):
            trainer(base_model, tmp_path, teachers, trees)
        with pytest.raises(ValueError, match="is not a value model"):
            trainer(base_model, tmp_path, base_model, trees)

    def test_student_of_other_objectives(self, base_model, trees, tmp_path):
        student = value_model(base_model, ["b"])
        with pytest.raises(ValueError, match=r"student has the objectives \['b'\]"):
            trainer(base_model, tmp_path, value_model(base_model, ["a"]), trees, student)
        student.config.base_model = None
        with pytest.raises(ValueError, match="names no base model"):
            trainer(base_model, tmp_path, value_model(base_model, ["b"]), trees, student)

    @pytest.mark.parametrize("rollouts", [[], None, "folder", [1]])
    def test_no_rollouts(self, base_model, tmp_path, rollouts):
        rollouts = str(tmp_path) if rollouts == "folder" else rollouts
        with pytest.raises(ValueError, match="`train_dataset` has no rollouts"):
            trainer(base_model, tmp_path, value_model(base_model, ["a"]), rollouts)

    @pytest.mark.parametrize(
        "field",
        [
            {"positions_per_sequence": 0},
            {"head_type": "none"},
            {"action_rank": 0},
            {"top_k": 1},
            {"uniform_weight": 1.5},
            {"value_weight": -1.0},
            {"head_learning_rate": -1.0},
        ],
    )
    def test_config(self, tmp_path, field):
        with pytest.raises(ValueError, match=f"`{next(iter(field))}`"):
            MAVISDistillationConfig(str(tmp_path), **field)
