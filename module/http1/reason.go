// SPDX-License-Identifier: Apache-2.0

package http1

// Reason names why a message was isolated or rejected, or a body is bad. Each is
// one counter, one log attribute, one column.
type Reason uint8

// The reasons, in the order in which a message meets them.
const (
	ReasonNone Reason = iota

	// Line syntax, anywhere in a head.
	ReasonBareCR
	ReasonBareLF
	ReasonNUL
	ReasonCTL
	ReasonHeadTooLarge

	// Request line.
	ReasonLeadingCRLF
	ReasonBadMethod
	ReasonConnect
	ReasonBadTarget
	ReasonTargetTooLong
	ReasonBadAuthority
	ReasonBadVersion
	ReasonUnsupportedVersion

	// Field lines.
	ReasonSpaceBeforeField
	ReasonObsFold
	ReasonEmptyFieldName
	ReasonBadFieldName
	ReasonSpaceBeforeColon
	ReasonNoColon
	ReasonTooManyFields
	ReasonSuspiciousName

	// Host.
	ReasonNoHost
	ReasonTwoHosts
	ReasonInvalidHost
	ReasonHostMismatch

	// Length of the body.
	ReasonBadContentLength
	ReasonContentLengthTooLarge
	ReasonTwoContentLengths
	ReasonRepeatedContentLength
	ReasonPaddedContentLength
	ReasonEmptyTransferEncoding
	ReasonUnknownTransferEncoding
	ReasonTwoTransferEncodings
	ReasonTransferEncodingAndLength
	ReasonTransferEncodingInOld
	ReasonUnexpectedBody

	// Connection handling.
	ReasonConnectionOption
	ReasonTooManyConnectionFields
	ReasonUpgrade
	ReasonExpectation

	// Responses.
	ReasonBadStatusLine
	ReasonStatusRange
	ReasonNoLength
	ReasonServerCloses
	ReasonSwitchingProtocols

	// Bodies.
	ReasonBadChunkSize
	ReasonChunkTooLarge
	ReasonBadChunkExtension
	ReasonChunkExtensionTooLong
	ReasonBadChunkLineEnd
	ReasonBadChunkDataEnd
	ReasonBadTrailer
	ReasonTrailersTooLarge
	ReasonOverrun

	reasonCount
)

// reasonTable holds, for each reason, its name and the response status.
var reasonTable = [reasonCount]struct {
	name   string
	status uint16
}{
	ReasonNone: {"none", 0},

	ReasonBareCR:       {"bare-cr", 400},
	ReasonBareLF:       {"bare-lf", 400},
	ReasonNUL:          {"nul", 400},
	ReasonCTL:          {"control-character", 400},
	ReasonHeadTooLarge: {"head-too-large", 431},

	ReasonLeadingCRLF:        {"too-many-leading-crlf", 400},
	ReasonBadMethod:          {"bad-method", 400},
	ReasonConnect:            {"connect", 501},
	ReasonBadTarget:          {"bad-target", 400},
	ReasonTargetTooLong:      {"target-too-long", 414},
	ReasonBadAuthority:       {"bad-authority", 400},
	ReasonBadVersion:         {"bad-version", 400},
	ReasonUnsupportedVersion: {"unsupported-version", 505},

	ReasonSpaceBeforeField: {"space-before-first-field", 400},
	ReasonObsFold:          {"obs-fold", 400},
	ReasonEmptyFieldName:   {"empty-field-name", 400},
	ReasonBadFieldName:     {"bad-field-name", 400},
	ReasonSpaceBeforeColon: {"space-before-colon", 400},
	ReasonNoColon:          {"no-colon", 400},
	ReasonTooManyFields:    {"too-many-fields", 431},
	ReasonSuspiciousName:   {"suspicious-field-name", 400},

	ReasonNoHost:       {"no-host", 400},
	ReasonTwoHosts:     {"two-hosts", 400},
	ReasonInvalidHost:  {"invalid-host", 400},
	ReasonHostMismatch: {"host-mismatch", 400},

	ReasonBadContentLength:          {"bad-content-length", 400},
	ReasonContentLengthTooLarge:     {"content-length-too-large", 400},
	ReasonTwoContentLengths:         {"two-content-lengths", 400},
	ReasonRepeatedContentLength:     {"repeated-content-length", 0},
	ReasonPaddedContentLength:       {"padded-content-length", 0},
	ReasonEmptyTransferEncoding:     {"empty-transfer-encoding", 400},
	ReasonUnknownTransferEncoding:   {"unknown-transfer-encoding", 501},
	ReasonTwoTransferEncodings:      {"two-transfer-encodings", 400},
	ReasonTransferEncodingAndLength: {"transfer-encoding-and-length", 400},
	ReasonTransferEncodingInOld:     {"transfer-encoding-not-allowed", 400},
	ReasonUnexpectedBody:            {"unexpected-body", 0},

	ReasonConnectionOption:        {"connection-option", 0},
	ReasonTooManyConnectionFields: {"too-many-connection-fields", 0},
	ReasonUpgrade:                 {"upgrade", 0},
	ReasonExpectation:             {"expectation", 0},

	ReasonBadStatusLine:      {"bad-status-line", 0},
	ReasonStatusRange:        {"status-out-of-range", 0},
	ReasonNoLength:           {"no-length", 0},
	ReasonServerCloses:       {"server-closes", 0},
	ReasonSwitchingProtocols: {"switching-protocols", 0},

	ReasonBadChunkSize:          {"bad-chunk-size", 400},
	ReasonChunkTooLarge:         {"chunk-too-large", 400},
	ReasonBadChunkExtension:     {"bad-chunk-extension", 400},
	ReasonChunkExtensionTooLong: {"chunk-extension-too-long", 400},
	ReasonBadChunkLineEnd:       {"bad-chunk-line-end", 400},
	ReasonBadChunkDataEnd:       {"bad-chunk-data-end", 400},
	ReasonBadTrailer:            {"bad-trailer", 400},
	ReasonTrailersTooLarge:      {"trailers-too-large", 400},
	ReasonOverrun:               {"overrun", 0},
}

// Reasons returns the number of reasons; every value below it is one.
func Reasons() int { return int(reasonCount) }

// String returns the reason's name in kebab case.
func (r Reason) String() string {
	if r < reasonCount {
		return reasonTable[r].name
	}
	return "invalid"
}

// HTTPStatus returns the status of the response that belongs to a request that
// was rejected for this reason: 400, 414, 431, 501 or 505; 0 if there is none,
// because the message is served or because it is a response.
func (r Reason) HTTPStatus() int {
	if r < reasonCount {
		return int(reasonTable[r].status)
	}
	return 0
}
