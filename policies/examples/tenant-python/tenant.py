#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
#
# The example "tenant" in Python, written against policy.proto alone. It needs
# Debian's python3-grpcio and python3-protobuf, and policy_pb2.py beside it:
#
#   protoc --proto_path=POLICYPB --python_out=. policy.proto
#
# where POLICYPB is the directory with policy.proto.
"""A policy plugin for Weir: each tenant has servers of its own."""

import json
import os
import signal
import sys
import threading
from concurrent import futures

import grpc

import policy_pb2 as pb

PACKAGE = "weir.policy.v1."


class Tenant:
    """The services of the plugin. Farms are configured one by one."""

    def __init__(self):
        self.lock = threading.Lock()
        self.farms = {}  # name -> configuration

    def describe(self, request, context):
        key = pb.AskKey(fields=[pb.Field(name="X-Tenant")])
        return pb.DescribeResponse(
            name="tenant-python",
            version="1.0.0",
            capabilities=[pb.Capability(name="push", version=1), pb.Capability(name="ask", version=1)],
            ask=key,
        )

    def configure(self, request, context):
        config, errors = parse(request.farm, request.config)
        if not errors and not request.check_only:
            with self.lock:
                self.farms[request.farm.name] = config
        return pb.ConfigureResponse(errors=errors)

    def forget(self, request, context):
        with self.lock:
            self.farms.pop(request.farm, None)
        return pb.ForgetResponse()

    def find(self, name, context):
        with self.lock:
            if name in self.farms:
                return self.farms[name]
        context.abort(grpc.StatusCode.NOT_FOUND, "farm %r was not configured" % name)

    def tick(self, request, context):
        self.find(request.farm, context)
        # There is nothing to send but the word that the plugin is there.
        if request.have_generation == 1:
            return pb.TickResponse()
        return pb.TickResponse(snapshot=pb.Snapshot(generation=1))

    def decide(self, request, context):
        config = self.find(request.farm, context)
        value = next((f.value.decode("latin-1") for f in request.fields if f.present), None)
        servers = config["tenants"].get(value)
        if servers is None:
            return pb.DecideResponse(reject=pb.Reject(status=config["unknown"]), ttl_ms=10000)
        choice = pb.ServerChoice(servers=[pb.ServerScore(server=s) for s in servers])
        return pb.DecideResponse(servers=choice, ttl_ms=10000)


def parse(farm, raw):
    """Returns the configuration and what is wrong with it."""
    errors = []

    def wrong(path, message):
        errors.append(pb.ConfigError(path=path, message=message))

    config = {"tenants": {}, "unknown": 403}
    try:
        given = json.loads(raw or b"{}")
    except ValueError as e:
        wrong("config", "is not JSON: %s" % e)
        return config, errors
    for key, value in given.items():
        if key not in config:
            wrong("config." + key, "unknown key, expected one of tenants, unknown")
        else:
            config[key] = value
    names = [s.name for s in farm.servers]
    if not isinstance(config["tenants"], dict):
        wrong("config.tenants", "expected a map")
        config["tenants"] = {}
    for tenant, servers in config["tenants"].items():
        for i, server in enumerate(servers if isinstance(servers, list) else [servers]):
            if server not in names:
                path = "config.tenants.%s[%d]" % (tenant, i)
                wrong(path, "server %r is not in farm %r, which has %s" % (server, farm.name, ", ".join(names)))
    if not isinstance(config["unknown"], int) or not 400 <= config["unknown"] <= 599:
        wrong("config.unknown", "expected a status from 400 to 599")
    return config, errors


def unary(function, request):
    return grpc.unary_unary_rpc_method_handler(
        function, request_deserializer=request.FromString, response_serializer=lambda m: m.SerializeToString()
    )


def health(request, context):
    # grpc.health.v1.HealthCheckResponse with status = SERVING.
    return b"\x08\x01"


def main():
    if os.environ.get("WEIR_POLICY_PLUGIN") != "answers-for-the-weir":
        sys.exit("This is a plugin for Weir, and is started by it.")
    tenant = Tenant()
    server = grpc.server(
        futures.ThreadPoolExecutor(max_workers=16),
        options=[("grpc.max_receive_message_length", 16 << 20), ("grpc.max_send_message_length", 16 << 20)],
    )
    handlers = {
        PACKAGE + "Base": {
            "Describe": unary(tenant.describe, pb.DescribeRequest),
            "Configure": unary(tenant.configure, pb.ConfigureRequest),
            "Forget": unary(tenant.forget, pb.ForgetRequest),
        },
        PACKAGE + "Push": {"Tick": unary(tenant.tick, pb.TickRequest)},
        PACKAGE + "Ask": {"Decide": unary(tenant.decide, pb.DecideRequest)},
        "grpc.health.v1.Health": {"Check": grpc.unary_unary_rpc_method_handler(health)},
    }
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(name, methods) for name, methods in handlers.items())
    )
    path = os.path.join(os.environ["PLUGIN_UNIX_SOCKET_DIR"], "tenant.sock")
    server.add_insecure_port("unix:" + path)
    server.start()
    # Weir waits for this line. Whatever else goes to standard output is lost.
    print("1|1|unix|%s|grpc|" % path, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's interrupt is for Weir
    if os.environ.get("WEIR_PARENT_STDIN") == "1":
        sys.stdin.buffer.read()  # it ends when Weir is gone
    else:
        server.wait_for_termination()
    server.stop(0)
    os._exit(0)


if __name__ == "__main__":
    main()
