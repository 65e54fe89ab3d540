"""A Diameter client on plain sockets: sessions of five requests each, many at a time.

usage: diameter_client.py PORT ORIGIN_HOST acct|credit SESSIONS PARALLEL

Prints one JSON line: how many requests were answered, how many answers came that nobody waited for,
the result codes, and which servers answered each session.
"""
import json
import socket
import struct
import sys

CER, ACR, CCR, DWR, DPR = 257, 271, 272, 280, 282
STEPS = 5


def avp(code, data, flags=0x40):
    if isinstance(data, int):
        data = struct.pack(">I", data)
    elif isinstance(data, str):
        data = data.encode()
    return struct.pack(">II", code, flags << 24 | len(data) + 8) + data + bytes(-len(data) % 4)


def message(flags, command, application, hop_by_hop, end_to_end, *avps):
    body = b"".join(avps)
    return struct.pack(">IIIII", 1 << 24 | len(body) + 20, flags << 24 | command, application,
                       hop_by_hop, end_to_end) + body


def avps(body):
    while body:
        code, rest = struct.unpack_from(">II", body)
        flags, length = rest >> 24, rest & 0xFFFFFF
        assert length >= 8, "an AVP shorter than its header"
        start = 12 if flags & 0x80 else 8
        yield code, body[start:length]
        body = body[length + -length % 4:]


class Client:
    def __init__(self, port, host, kind):
        self.host, self.kind = host, kind
        self.application = 3 if kind == "acct" else 4
        self.socket = socket.create_connection(("127.0.0.1", port), 10)
        self.socket.settimeout(60)
        self.buffer = b""

    def read(self):
        """The next message; watchdogs are answered on the way."""
        while True:
            if len(self.buffer) >= 4:
                length = struct.unpack(">I", self.buffer[:4])[0] & 0xFFFFFF
                if len(self.buffer) >= length:
                    whole, self.buffer = self.buffer[:length], self.buffer[length:]
                    word, application, hop, end = struct.unpack_from(">IIII", whole, 4)
                    flags, command = word >> 24, word & 0xFFFFFF
                    if flags & 0x80 and command in (DWR, DPR):
                        self.socket.sendall(message(0, command, 0, hop, end, avp(268, 2001),
                                                    *self.origin()))
                        continue
                    return flags, command, hop, end, list(avps(whole[20:]))
            part = self.socket.recv(65536)
            if not part:
                raise EOFError("the connection was closed")
            self.buffer += part

    def origin(self):
        return avp(264, self.host), avp(296, "example.net")

    def introduce(self):
        named = avp(259 if self.kind == "acct" else 258, self.application)
        self.socket.sendall(message(0x80, CER, 0, 1, 1, *self.origin(), avp(257, b"\0\1\x7f\0\0\1"),
                                    avp(266, 0), avp(269, "plain", 0), named))
        flags, command, _, _, told = self.read()
        assert command == CER and not flags & 0x80, "no CEA"
        result = dict(told)[268]
        assert result == struct.pack(">I", 2001), f"CEA: {result.hex()}"

    def request(self, identifier, session, step):
        first, last = step == 0, step == STEPS - 1
        common = [avp(263, session), *self.origin(), avp(283, "example.net")]
        if self.kind == "acct":
            kind = 2 if first else 4 if last else 3
            rest, command = [avp(480, kind), avp(485, step), avp(259, 3)], ACR
        else:
            kind = 1 if first else 3 if last else 2
            rest = [avp(258, 4), avp(461, "test@example.net"), avp(416, kind), avp(415, step)]
            command = CCR
        return message(0xC0, command, self.application, identifier, identifier ^ 0x5A5A5A5A,
                       *common, *rest)

    def run(self, sessions, parallel):
        waiting, results, owners, strangers, identifier = {}, {}, {}, 0, 0

        def send(session, step):
            nonlocal identifier
            identifier += 1
            waiting[identifier] = (session, step)
            self.socket.sendall(self.request(identifier, f"{self.host};{session}", step))

        begun = min(parallel, sessions)
        for session in range(begun):
            send(session, 0)
        answered = 0
        while waiting:
            flags, _, hop, end, told = self.read()
            if flags & 0x80:
                continue
            if hop not in waiting or end != hop ^ 0x5A5A5A5A:
                strangers += 1
                continue
            session, step = waiting.pop(hop)
            told = dict(told)
            assert told[263].decode() == f"{self.host};{session}", "another session's answer"
            answered += 1
            code = str(struct.unpack(">I", told[268])[0])
            results[code] = results.get(code, 0) + 1
            owners.setdefault(session, [])
            if told[264].decode() not in owners[session]:
                owners[session].append(told[264].decode())
            if step + 1 < STEPS:
                send(session, step + 1)
            elif begun < sessions:
                begun += 1
                send(begun - 1, 0)
        # A second answer to anything would come before the answer to this.
        self.socket.sendall(message(0x80, DWR, 0, 7, 7, *self.origin()))
        while self.read()[1] != DWR:
            strangers += 1
        return {"answered": answered, "strangers": strangers, "results": results,
                "owners": list(owners.values())}


def main():
    port, host, kind, sessions, parallel = sys.argv[1:]
    client = Client(int(port), host, kind)
    client.introduce()
    print(json.dumps(client.run(int(sessions), int(parallel))))


main()
