module github.com/weirgate/weir/integration/bench/scanners

go 1.26.8

require github.com/weirgate/weir v0.0.0

require (
	github.com/klauspost/compress v1.20.3 // indirect
	github.com/molecule-man/go-brrr v1.3.0 // indirect
	github.com/valyala/bytebufferpool v1.0.0 // indirect
	github.com/valyala/fasthttp v1.77.0
)

replace github.com/weirgate/weir => ../../..
