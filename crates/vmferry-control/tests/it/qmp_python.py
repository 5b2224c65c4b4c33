"""Drives the server at the socket given as argument: connect, execute, errors, events, quit."""

import asyncio
import sys

from qemu.qmp import ExecuteError, QMPClient


async def drive(path: str) -> None:
    client = QMPClient("test")
    await client.connect(path)
    status = await client.execute("query-status")
    assert status == {"status": "prelaunch", "running": False}, status

    with client.listener(("STOP", "RESUME", "MIGRATION")) as listener:
        await client.execute("cont")
        event = await listener.get()
        assert event["event"] == "RESUME", event
        await client.execute("migrate", {"uri": "tcp:127.0.0.1:4444"})
        event = await listener.get()
        assert event["data"] == {"status": "setup"}, event

    info = await client.execute("query-migrate")
    assert info["status"] == "active", info

    for command, arguments, kind, text in (
        ("foo", None, "CommandNotFound", "The command foo has not been found"),
        ("migrate-continue", {}, "GenericError", "Parameter 'state' is missing"),
    ):
        try:
            await client.execute(command, arguments)
        except ExecuteError as error:
            assert error.error_class == kind, error.error_class
            assert str(error) == text, str(error)
        else:
            raise AssertionError(f"{command} did not fail")

    commands = [entry["name"] for entry in await client.execute("query-commands")]
    assert "migrate" in commands, commands
    await client.execute("quit")
    await client.disconnect()


asyncio.run(asyncio.wait_for(drive(sys.argv[1]), timeout=20))
