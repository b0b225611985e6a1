"""What a compiled step needs and sends, and that the plan prints it."""

import re

import commands
import jax
import jax.numpy as jnp
import pytest

from configs import camvid, carla, default, folder, isbi2012, oxford_iiit_pet
from unet_jax import data, models
from unet_jax.errors import UserError
from unet_jax.models import encoders, unet
from unet_jax.parallel import sharding
from unet_jax.training import plan, program

CARLA = {
    "features": (32, 64, 128, 256, 512),
    "upsample": "transposed_3x3",
    "dropout": 0.3,
    "dropout_on_skip": True,
}


def _compile(config, count=8, space=1):
    config.mesh.space = space
    mesh = sharding.create_mesh(0, space, jax.devices()[:count])
    return plan.compile_step(config, plan.find_classes(config.data), mesh)


def _traffic(made):
    """Kind -> what is sent, for each kind that occurs."""
    found = {}
    for collective in program.collectives(made.compiled):
        found.setdefault(collective.kind, []).append(collective)
    return found


def _sizes(collectives):
    return sum(c.size * c.executions for c in collectives)


@pytest.fixture
def plain(config):
    """SGD without normalisation, so that only gradients and four scalars are summed over devices."""
    config.model.norm, config.optimizer.name, config.optimizer.ema = "none", "sgd", 0.0
    return config


@pytest.mark.parametrize(
    "settings, image, outputs, expected",
    [
        (dict(padding="valid", dropout=0.5), (572, 572, 1), 2, 902.6),
        ({}, (256, 256, 3), 1, 289.1),
        ({}, (512, 512, 3), 1, 1154),
        ({"features": (32, 64, 128, 256, 512)}, (256, 256, 3), 1, 72.5),
        (CARLA, (96, 128, 3), 23, 14.4),  # without the extra convolution
    ],
)
def test_flops_of_training_equal_the_known_numbers(settings, image, outputs, expected):
    model = unet.UNet(outputs, **settings)
    params = models.abstract_variables(model, image[-1])["params"]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    loss = lambda params, image, keys: model.apply({"params": params}, image, keys).sum()
    arguments = params, jax.ShapeDtypeStruct((1, *image), jnp.float32), keys
    forward, training = (program.flops(f, *arguments) for f in (loss, jax.value_and_grad(loss)))
    # The image needs no gradient, so training is three times the forward pass less the first convolution, which is
    # less than 0.5 % of it in all of these networks.
    assert 2.985 * forward < training < 3 * forward
    assert training / 1e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "name, expected",
    # In multiply-adds, with the classifiers that are left out here: EfficientNet-Lite0 0.385 G, torchvision's 1.814 G.
    [("efficientnet_lite0", 0.385e9 - 7 * 7 * 320 * 1280 - 1280e3), ("resnet18", 1.814e9 - 512e3)],
)
def test_flops_of_encoders_equal_the_known_numbers(name, expected):
    encoder, image = encoders.find(name).make(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(lambda image: encoder.init(jax.random.key(0), image, False), image)
    found = program.flops(lambda variables, image: encoder.apply(variables, image, False), variables, image)
    assert found / 2 == pytest.approx(expected, rel=0.002)


@pytest.mark.slow
def test_rematerialised_work_is_counted(plain):
    stored = plan.flops(plain, _compile(plain))
    plain.model.remat = (0, 1, 2)
    rematerialised = plan.flops(plain, _compile(plain))
    assert 1.25 * stored < rematerialised < 4 / 3 * stored  # a second forward pass, but for up-sampling and head


def test_flops_follow_loops_branches_and_products():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 4))
    assert program.flops(jnp.dot, a, b) == 2 * 3 * 4 * 4
    loop = lambda a, b: jax.lax.scan(lambda a, _: (a @ b, None), a, length=5)[0]
    assert program.flops(jax.jit(jax.checkpoint(loop)), a, b) == 5 * 2 * 3 * 4 * 4
    branch = lambda a, b: jax.lax.cond(a.sum() > 0, lambda: a @ b @ b, lambda: a @ b)
    assert program.flops(branch, a, b) == 2 * 2 * 3 * 4 * 4


HLO = """HloModule jit_f, num_partitions=8
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %z = f32[] add(%x, %y)
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.1 = (f32[2,2]{1,0}, bf16[4]{0:T(256)}) all-reduce(%a, %b), replica_groups=[2,4]<=[8], to_apply=%add
  %permute = (f32[3]{0}, f32[3]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}
}
%condition (p: (s32[], f32[4])) -> pred[] {
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %loop = (s32[], f32[4]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %start = (f32[2]{0}, f32[4]{0}) all-gather-start(%y), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
  %gathered = f32[4]{0} all-gather-done(%start)
  %scatter = f32[16]{0} reduce-scatter(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, metadata={op_name="n"}
  ROOT %swap = pred[64]{0} all-to-all(%y), replica_groups={}, dimensions={0}
}
"""


def test_collectives_are_read_in_all_their_notations():
    expected = [
        program.Collective("all-reduce", 4 * 4 + 4 * 2, 4, 3, ""),
        program.Collective("collective-permute", 12, 2, 3, ""),
        program.Collective("all-gather", 16, 2, 1, ""),
        program.Collective("reduce-scatter", 16 * 4 * 4, 4, 1, "n"),
        program.Collective("all-to-all", 64, 8, 1, ""),
    ]
    assert program.read_collectives(HLO) == expected
    sent = [3 * 24 * 2 * 3 / 4, 3 * 12, 16 / 2, 256 * 3 / 4, 64 * 7 / 8]
    assert [collective.sent for collective in expected] == sent


def test_devices_that_share_a_batch_exchange_gradients_and_four_scalars(plain):
    made = _compile(plain)
    traffic = _traffic(made)
    assert traffic.keys() == {"all-reduce"}
    assert all(c.participants == 8 and c.factor == 2 * 7 / 8 for c in traffic["all-reduce"])
    params = program.held_bytes(made.arguments[0].params)
    assert _sizes(traffic["all-reduce"]) == params + 3 * 4 + 1  # loss, sum of its weights, signal; any label


def test_microbatches_exchange_gradients_once_each(plain):
    plain.train.batch_size, plain.train.accumulate = 16, 2
    made = _compile(plain)
    traffic = _traffic(made)
    assert traffic.keys() == {"all-reduce"}
    params = program.held_bytes(made.arguments[0].params)
    # The compiler places each sum where its gradient is computed: twice what is needed.
    assert _sizes(traffic["all-reduce"]) == 2 * (params + 4) + 2 * 4 + 1


def test_devices_that_share_images_exchange_borders(plain):
    made = _compile(plain, space=2)
    traffic = _traffic(made)
    assert traffic.keys() == {"all-reduce", "collective-permute"}
    widest = 2 * 48 * 8 * 4  # input of the last decoder block: a row of two images of 48 columns, 8 channels
    assert max(c.size for c in traffic["collective-permute"]) == widest
    # Gradients are summed along one axis of the mesh, then along the other.
    params = program.held_bytes(made.arguments[0].params)
    assert params <= _sizes(traffic["all-reduce"]) <= 2 * params + 100


@pytest.mark.slow
def test_a_sharded_optimizer_takes_an_eighth_and_only_weights_are_gathered(plain):
    plain.model.features = (8, 8, 16)  # divisible by eight, but for the input of the first kernel
    whole = _compile(plain)
    plain.mesh.shard_optimizer = True
    made = _compile(plain)
    held = [program.held_bytes(m.arguments[0].opt_state) for m in (whole, made)]
    assert held[1] < held[0] / 8 + 200  # bytes of the head and of arrays with no axis for eight devices
    traffic = _traffic(made)
    assert traffic.keys() == {"all-reduce", "all-gather"}
    sizes = {x.size * 4 for x in jax.tree.leaves(made.arguments[0].params)}
    assert {c.size for c in traffic["all-gather"]} <= sizes
    assert _sizes(traffic["all-gather"]) <= program.held_bytes(made.arguments[0].params)


@pytest.mark.slow
@pytest.mark.parametrize("model", [{}, {"padding": "valid"}, {"upsample": "bilinear"}])
def test_eight_devices_share_the_memory_of_one_image(config, optimized, model, monkeypatch):
    config.data.size = (2008, 2048) if model.get("padding") == "valid" else (2048, 2048)  # 2048 rows with margins
    config.model.features, config.train.batch_size, config.loss.dice = (2, 4, 4), 1, 0.5
    config.model.update(model)
    monkeypatch.setattr(sharding, "is_one_cpu", lambda mesh: False)  # the same convolutions
    one, eight = _compile(config, 1).peak, _compile(config, 8, space=8).peak
    # An eighth, and the border rows. The image as it is read, one byte a value, is whole on every device.
    assert eight < 0.2 * one


def test_the_largest_batch_is_found_and_verified_by_few_compilations():
    tried = []

    def search(needed, first, unit, limit):
        tried.clear()
        return plan.largest_batch(lambda n: tried.append(n) or needed(n), first, unit, limit)

    line = lambda n: 1000 + 10 * n
    assert search(line, 8, 8, 9_900)[0] == 888 and len(tried) <= 5
    bent = lambda n: 1000 + 10 * n + (n > 100) * 5 * (n - 100)
    batch, peaks, certain = search(bent, 16, 4, 9_900)
    assert certain and peaks[batch] <= 9_900 < peaks[batch + 4] and len(tried) <= 8
    assert search(line, 64, 8, 1_100)[0] == 8
    assert search(line, 64, 8, 1_000) == (0, {64: 1640, 8: 1080}, True)
    assert search(lambda n: 5, 8, 8, 10)[2] is False and len(tried) == plan.MAX_COMPILATIONS


@pytest.mark.slow
def test_a_plan_prints_everything_and_writes_nothing(tmp_path):
    flags = (f"--config={commands.TINY}", "--mode=plan", "--memory_gib=1")
    output = commands.succeed(*flags, folder=tmp_path)
    rows = (
        "network devices step parameters optimizer EMA batch activations peak all.devices each.device by.XLA "
        "sent.by.each.device all-reduce"
    )
    for row in rows.split():
        assert re.search(rf"^ *{row}\b", output, re.M), (row, output)
    assert "2(n-1)/n, n = 8" in output and "mesh data=8 space=1" in output and "shard_optimizer=False" in output
    assert [file for file in tmp_path.rglob("*") if not file.name.startswith("output_")] == []
    found = re.search(r"largest batch +(\d+), a multiple of 8 .*; (\d+), the next", output, re.S)
    batch, above = map(int, found.groups())
    assert above == batch + 8


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_does_not(plain, capsys):
    plain.train.accumulate, plain.train.batch_size = 2, 16
    plan.plan(plain, 0.01)
    found = re.search(r"largest batch +(\d+), a multiple of 16 ", capsys.readouterr().out)
    plain.train.batch_size = int(found.group(1))
    assert _compile(plain).peak <= 0.01 * 2**30
    plain.train.batch_size += 16
    assert _compile(plain).peak > 0.01 * 2**30


def test_without_a_memory_size_the_plan_asks_for_it(plain, capsys):
    plan.plan(plain, None)
    assert "not searched for: no --memory_gib was given" in capsys.readouterr().out
    with pytest.raises(UserError, match="memory_gib=-1 must be positive"):
        plan.plan(plain, -1)


def test_classes_are_known_without_files():
    known = {carla: 23, camvid: 11, isbi2012: 2, oxford_iiit_pet: 3, default: 7}
    assert {file: len(plan.find_classes(file.get_config().data).names) for file in known} == known
    with pytest.raises(UserError, match=r"labels and config.data.channels are not .* 'data/folder' is not a folder"):
        plan.find_classes(folder.get_config().data)
    settings = folder.get_config().data
    settings.labels = ("0 background", "255 -> 1 cell")
    with pytest.raises(UserError, match="are not set; they can be inferred"):
        data.classes(settings)
