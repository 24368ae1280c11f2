#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# Generates policypb from policy.proto, with pinned generators in a directory of
# their own. Needs protoc (Debian: protobuf-compiler) and go.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin GOFLAGS= go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
GOBIN=$bin GOFLAGS= go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.1
# The version of protoc goes into no file: what is generated must not differ
# between two distributions.
PATH=$bin:$PATH protoc --proto_path=policypb \
	--go_out=policypb --go_opt=paths=source_relative \
	--go-grpc_out=policypb --go-grpc_opt=paths=source_relative \
	policy.proto
sed -i '/^\/\/ \(- \|	\)\{0,1\}protoc  *v[0-9]/d;/^\/\/ - protoc  *(unknown)/d' policypb/*.pb.go
gofmt -w policypb/*.pb.go
