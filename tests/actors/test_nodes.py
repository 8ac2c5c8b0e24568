"""What nodes see, and by which address machines reach each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from actors import network
from actors.nodes import look, marked, refuse_blind
from modeseek_ray.errors import ConfigError, StorageError
from modeseek_ray.jobs.paths import Home, allowed_path


def test_a_node_that_sees_everything_has_nothing_to_say(tiny_dense: Path, tmp_path: Path) -> None:
    with marked(tmp_path / "job", [tiny_dense]) as shared:
        assert look(shared) is None
        (marker,) = (tmp_path / "job").iterdir()  # what a node wrote to try is gone
        assert marker.name == shared.marker
    assert not any((tmp_path / "job").iterdir())


def test_what_a_node_does_not_see_is_named(tiny_dense: Path, tmp_path: Path) -> None:
    with marked(tmp_path / "job", [tiny_dense]) as shared:
        (tmp_path / "job" / shared.marker).unlink()  # as on a node with a directory of its own there
        assert look(shared, patience_s=0) == f"does not see {tmp_path / 'job'}"


def test_another_model_of_the_same_path_is_seen(tiny_dense: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_bytes((tiny_dense / name).read_bytes())
    with marked(tmp_path / "job", [model]) as shared:
        with (model / "model.safetensors").open("ab") as weights:
            weights.write(b"\0")
        assert look(shared) == f"has another model at {model}"
        (model / "config.json").unlink()
        assert look(shared) == f"does not see the model {model}"


def test_a_blind_node_stops_the_job_by_name_and_says_how_to_mend_it() -> None:
    refuse_blind({"10.0.0.1": None, "10.0.0.2": None})
    with pytest.raises(StorageError, match=r"1 of 2 nodes .* node 10.0.0.2 does not see /data") as caught:
        refuse_blind({"10.0.0.1": None, "10.0.0.2": "does not see /data"})
    assert caught.value.code == "storage_not_shared" and "MODESEEK_STORAGE" in caught.value.mend


def test_a_storage_that_cannot_be_written_is_said_by_the_driver(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), marked(tmp_path / "file" / "job", []):
        pass


@pytest.mark.parametrize(
    ("host", "cluster", "advertised", "url"),
    [
        ("127.0.0.1", None, None, "http://127.0.0.1:8420"),  # a head of our own
        ("0.0.0.0", None, None, "http://127.0.0.1:8420"),  # no address to call
        ("127.0.0.1", "localhost", None, "http://127.0.0.1:8420"),  # a cluster on this machine, or a tunnel
        ("192.0.2.7", "192.0.2.1", None, "http://192.0.2.7:8420"),
        ("0.0.0.0", "192.0.2.1", "http://modeseek:8420/", "http://modeseek:8420"),
        ("2001:db8::7", "192.0.2.1", None, "http://[2001:db8::7]:8420"),
    ],
)
def test_the_url_that_drivers_are_told(
    host: str, cluster: str | None, advertised: str | None, url: str
) -> None:
    assert network.url_for_drivers(host, 8420, cluster, advertised) == url


def test_listening_everywhere_tells_a_foreign_cluster_the_address_it_sees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "address_towards", lambda host: "198.51.100.4")
    assert network.url_for_drivers("0.0.0.0", 8420, "192.0.2.1", None) == "http://198.51.100.4:8420"


def test_loopback_and_a_cluster_elsewhere_are_refused() -> None:
    with pytest.raises(ConfigError, match="MODESEEK_ADVERTISE_URL"):
        network.url_for_drivers("127.0.0.1", 8420, "192.0.2.1", None)


def test_the_interface_towards_another_rank_is_the_one_that_holds_our_address() -> None:
    loopback = network.own_addresses()["127.0.0.1"]
    assert network.interface_towards("127.0.0.1") == network.interface_towards("127.9.9.9") == loopback
    for address, name in network.own_addresses().items():
        if not address.startswith("127.") and "." in address:
            assert network.interface_towards(address) == name


def test_a_rank_tells_gloo_its_interface_and_lets_an_operator_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.trainer import TrainerRank

    class Spec:
        class resources:
            gpus_per_worker, cpus_per_worker = 0.0, 1.0

    spec: Any = Spec()
    # Set first, so that both are put back afterwards.
    for name in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    import os

    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    TrainerRank(spec, 0, 1, "127.0.0.1", 1234)._prepare_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] in psutil.net_if_addrs()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    TrainerRank(spec, 0, 1, "127.0.0.1", 1234)._prepare_environment()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_storage_holds_what_nodes_share_and_home_what_they_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MODESEEK_STORAGE", str(tmp_path / "shared"))
    monkeypatch.delenv("MODESEEK_STORE_URL", raising=False)
    home = Home.at(tmp_path / "own")
    home.prepare()
    shared = (home.files, home.jobs, home.cache, home.secret("ftjob-1", 1), home.endpoints, home.engines)
    assert all(path.is_relative_to(tmp_path / "shared") for path in shared)
    assert home.lock.is_relative_to(tmp_path / "own") and str(tmp_path / "own") in home.store_url
    assert Home(home.storage).jobs == home.jobs  # what a driver is told
    monkeypatch.setenv("MODESEEK_STORAGE", str(tmp_path / "own" / "store.sqlite3"))
    (tmp_path / "own" / "store.sqlite3").write_text("")
    with pytest.raises(StorageError, match="cannot be created"):
        Home.at(tmp_path / "own").prepare()


def test_the_doctor_looks_at_the_storage_where_it_is_another_directory(tmp_path: Path) -> None:
    from actors.cli import doctor

    (tmp_path / "file").write_text("")
    url = "http://127.0.0.1:1"
    found = {check.name: check for check in doctor.collect(tmp_path / "home", url, tmp_path / "file" / "x")}
    assert found["home"].ok and not found["storage"].ok
    assert "MODESEEK_STORAGE" in found["storage"].mend
    assert "storage" not in {check.name for check in doctor.collect(tmp_path / "home", url)}


def test_a_root_opens_neither_the_home_nor_the_storage(tmp_path: Path) -> None:
    home = Home(tmp_path / "home", tmp_path / "storage")
    for directory in (home.root, home.files, tmp_path / "models"):
        directory.mkdir(parents=True)
    assert allowed_path(tmp_path / "models", [tmp_path], home) == tmp_path / "models"
    for own in (home.root, home.storage, home.file("file-1")):
        assert allowed_path(own, [tmp_path], home) is None
