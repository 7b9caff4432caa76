import math

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2
from tiny import image_data, net
from torch import nn

import dysurgery
from dysurgery import DysurgeryError, UsageError
from dysurgery.train.loop import Observer, evaluate, train
from dysurgery.train.processes import Processes
from dysurgery.train.recipe import Augment, Distill, Temperature


def dynamic(**options):
    return dysurgery.convert(net(**options).eval(), torch.randn(1, 3, 8, 8), seed=0)


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def distance(left, right):
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def test_it_learns_and_says_what_every_epoch_came_to(job):
    epochs, model = train(job(dynamic(), epochs=8, temperature=Temperature(30, 1, 4)))
    assert [epoch.number for epoch in epochs] == list(range(1, 9))
    assert epochs[-1].loss < epochs[0].loss
    assert epochs[-1].accuracy > 60
    assert [epoch.tau for epoch in epochs[:5]] == pytest.approx([22.75, 15.5, 8.25, 1, 1])
    assert 0 < epochs[0].entropy <= 1
    assert epochs[0].spread > 0
    assert epochs[0].images_per_second > 0
    assert not model.training


def test_the_same_seed_gives_the_same_weights_and_the_global_state_plays_no_part(job):
    torch.manual_seed(1)
    first = tensors(train(job(dynamic(dropout=0.3)))[1])
    torch.manual_seed(2)
    assert distance(first, tensors(train(job(dynamic(dropout=0.3)))[1])) == 0


def test_parts_of_a_batch_are_the_whole_batch(job):
    whole, parts = (train(job(dynamic(), accumulate=n))[1] for n in (1, 4))
    assert distance(tensors(whole), tensors(parts)) < 1e-5


def test_tau_per_epoch_is_constant_within_one(job):
    seen = []

    class Watch(Observer):
        def on_step(self, step):
            seen.append((step.epoch, step.tau))

    train(job(dynamic(), temperature=Temperature(30, 1, 3, per="epoch"), observer=Watch()))
    assert [tau for epoch, tau in seen if epoch == 2] == pytest.approx([30 - 29 / 3] * 3)
    seen.clear()
    train(job(dynamic(), temperature=Temperature(30, 1, 3, per="step"), observer=Watch()))
    assert len({tau for epoch, tau in seen if epoch == 2}) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"amp": "bf16"},
        {"amp": "fp16"},
        {"channels_last": True},
        {"clip_grad": 1.0},
        {"clip_grad": 0.01, "clip_mode": "agc"},
        {"clip_grad": 0.5, "clip_mode": "value", "amp": "fp16"},
        {"opt": "adamw", "lr": 0.003},
        {"ema_decay": 0.9},
        {"label_smoothing": 0.1},
        {"sched": "step", "sched_on": "epoch", "decay_epochs": 1},
        {"sched": "multistep", "milestones": (1.0, 2.0)},
        {"sched": "plateau", "sched_on": "epoch"},
        {"sched": "none"},
        {"warmup_epochs": 1.0, "min_lr": 1e-4},
        {"keep": "best"},
        {"workers": 1},
    ],
    ids=str,
)
def test_every_option_trains_every_bank_and_attention(job, options):
    model = dynamic()
    before = tensors(model)
    epochs, trained = train(job(model, **options))
    assert all(math.isfinite(epoch.loss) for epoch in epochs)
    after = tensors(trained)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert {name for name in after if "tau" not in name} <= set(moved)


@pytest.mark.parametrize(
    "augment",
    [Augment(mixup=0.4), Augment(cutmix=1.0), Augment(random_erasing=1.0), Augment(auto_augment="rand-m5")],
    ids=["mixup", "cutmix", "erasing", "randaugment"],
)
def test_every_augmentation_of_a_batch_is_reproducible(job, augment):
    first, second = (tensors(train(job(dynamic(), augment=augment, epochs=2))[1]) for _ in range(2))
    plain = tensors(train(job(dynamic(), augment=Augment(), epochs=2))[1])
    assert distance(first, second) == 0
    assert distance(first, plain) > 0


def test_the_schedule_is_timms(job):
    rates = []

    class Watch(Observer):
        def on_step(self, step):
            rates.append(step.lr)

    train(job(net(), epochs=3, lr=0.2, warmup_epochs=1.0, observer=Watch()))
    optimizer = torch.optim.SGD(net().parameters(), 0.2)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", 3, warmup_epochs=1, warmup_lr=0.0, step_on_epochs=False, updates_per_epoch=3
    )
    expected = []
    for step in range(9):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
    assert rates == pytest.approx(expected)


def test_the_moving_average_is_what_is_validated_kept_and_has_the_tau_of_now(job):
    _, kept = train(job(dynamic(), ema_decay=0.99, temperature=Temperature(30, 1, 3)))
    model = dynamic()
    _, last = train(job(model, temperature=Temperature(30, 1, 3)))
    assert dysurgery.temperature(kept) == dysurgery.temperature(last) == 1.0
    assert distance(tensors(kept), tensors(last)) > 0


def test_the_best_epoch_can_be_kept(job):
    epochs, model = train(job(dynamic(), epochs=6, lr=1.0, keep="best", sched="constant"))
    run = job(model)
    from dysurgery.train.data import val_loader

    loader = val_loader(run.data.val, run.preprocessing, 256, 0, torch.device("cpu"))
    found = evaluate(model, loader, Processes(torch.device("cpu")))["top1"]
    assert found == max(epoch.accuracy for epoch in epochs)


@pytest.mark.parametrize(
    ("train_what", "moves"),
    [("all", {"conv1", "conv2", "fc"}), ("dynamic", {"conv2"}), ("attention", {"conv2"})],
)
def test_only_what_is_to_train_moves(job, train_what, moves):
    model = dynamic()
    dysurgery.calibrate(model, torch.randn(16, 3, 8, 8))
    with torch.no_grad():  # equal kernels give the attention no gradient
        model.conv2.bank += 0.1 * torch.randn_like(model.conv2.bank)
    before = tensors(model)
    after = tensors(train(job(model, train=train_what))[1])
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name.partition(".")[0] for name in moved} == moves
    assert ("conv2.bank" in moved) == (train_what != "attention")


def test_nothing_to_train_is_named(job):
    with pytest.raises(UsageError, match="nothing to train"):
        train(job(net(), train="attention"))


@pytest.mark.parametrize("labels", [True, False])
def test_distillation_brings_the_student_to_the_teacher(job, labels):
    torch.manual_seed(3)
    teacher = net().eval()
    with torch.no_grad():
        teacher.fc.weight *= 20
    student = dynamic()
    images = torch.randn(64, 3, 8, 8)

    def apart():
        with torch.no_grad():
            return (student.eval()(images).softmax(1) - teacher(images).softmax(1)).abs().mean().item()

    before, kept = apart(), tensors(teacher)
    train(job(student, epochs=12, distill=Distill(5.0, 1.0, 1.0, labels), teacher=teacher))
    assert apart() < 0.7 * before
    assert distance(kept, tensors(teacher)) == 0


def test_without_labels_they_play_no_part(job):
    def run(shift):
        data = image_data()
        data.train.targets = [(target + shift) % 3 for target in data.train.targets]
        return tensors(train(job(dynamic(), data=data, distill=Distill(labels=False), teacher=net().eval()))[1])

    assert distance(run(0), run(1)) == 0


def test_a_loss_that_is_not_finite_stops_with_the_step_lr_and_tau(job, tmp_path):
    run = job(dynamic(), lr=1e30, temperature=Temperature(30, 1, 3), folder=tmp_path / "state", save_seconds=0)
    with pytest.raises(
        DysurgeryError, match=r"not finite at step \d+ \(epoch \d, lr [\d.]+e\+\d+, tau \d+.*last good state"
    ):
        train(run)
    state = torch.load(tmp_path / "state" / "state.pt", weights_only=True)
    assert all(torch.isfinite(t).all() for t in state["model"].values())


def test_out_of_memory_says_how_to_need_less(job, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = net()
    run = job(model)
    hook = model.conv2.register_forward_hook(lambda module, args, output: full() if module.training else None)
    with pytest.raises(DysurgeryError, match=r"16 images at a time.*finetune.accumulate=2"):
        train(run)
    hook.remove()


def test_an_unknown_optimizer_is_one_sentence(job):
    with pytest.raises(UsageError, match="adamm"):
        train(job(net(), opt="adamm"))


def test_a_timm_network_with_batchnorm_dropout_and_droppath(job):
    model = timm.create_model("mobilenetv3_small_050", num_classes=3, drop_rate=0.2, drop_path_rate=0.1)
    run = job(dysurgery.convert(model.eval(), torch.randn(1, 3, 32, 32)), epochs=1)
    run.preprocessing = {**run.preprocessing, "input_size": [3, 32, 32]}
    epochs, _ = train(run)
    assert math.isfinite(epochs[0].loss)
    assert isinstance(model, nn.Module)
