"""Moves a guest between two machines, given by their monitors: source, destination."""

import asyncio
import sys

from qemu.qmp import QMPClient


async def connect(name: str, path: str) -> QMPClient:
    client = QMPClient(name)
    await client.connect(path)
    capabilities = [{"capability": "events", "state": True}]
    await client.execute("migrate-set-capabilities", {"capabilities": capabilities})
    return client


async def reach(listener, status: str) -> list[str]:
    seen = []
    while status not in seen:
        event = await listener.get()
        seen.append(event["data"]["status"])
        assert seen[-1] not in ("failed", "cancelled"), seen
    return seen


async def drive(source_path: str, destination_path: str) -> None:
    source = await connect("source", source_path)
    destination = await connect("destination", destination_path)
    assert await destination.execute("query-status") == {
        "status": "inmigrate",
        "running": False,
    }
    await destination.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
    listening = (await destination.execute("query-migrate"))["socket-address"]
    address = {"transport": "socket", **listening[0]}

    measure = {"calc-time": 100, "calc-time-unit": "millisecond", "mode": "dirty-bitmap"}
    await source.execute("calc-dirty-rate", measure)
    while (rate := await source.execute("query-dirty-rate"))["status"] == "measuring":
        await asyncio.sleep(0.05)
    assert rate["status"] == "measured" and rate["dirty-rate"] > 0, rate

    parameters = {"downtime-limit": 200, "max-bandwidth": 1 << 30}
    await source.execute("migrate-set-parameters", parameters)
    with source.listener("MIGRATION") as left, destination.listener(
        "MIGRATION"
    ) as arrived:
        channels = [{"channel-type": "main", "addr": address}]
        await source.execute("migrate", {"channels": channels})
        seen = await reach(left, "completed")
        assert seen == ["setup", "active", "device", "completed"], seen
        await reach(arrived, "completed")

    info = await source.execute("query-migrate")
    assert info["status"] == "completed", info
    assert info["ram"]["remaining"] == 0, info
    assert info["downtime"] < info["total-time"], info
    assert (await source.execute("query-status"))["status"] == "postmigrate"
    assert (await destination.execute("query-status"))["running"]

    await source.execute("quit")
    await destination.disconnect()
    try:
        await source.disconnect()
    except EOFError:
        pass  # The source was faster: it is gone, with its end of the connection.


asyncio.run(asyncio.wait_for(drive(sys.argv[1], sys.argv[2]), timeout=50))
