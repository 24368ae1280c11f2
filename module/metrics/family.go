// SPDX-License-Identifier: Apache-2.0

package metrics

import "github.com/prometheus/client_golang/prometheus"

// The labels. Each has as many values as the configuration has names, or as
// the program has words.
const (
	labelFarm      = "farm"
	labelServer    = "server"
	labelReason    = "reason" // engine.Reason, farm.CloseKind, farm.FailKind and the like
	labelQueue     = "queue"
	labelPlugin    = "plugin"
	labelState     = "state"
	labelVerdict   = "verdict"
	labelCounter   = "counter" // of the ruleset
	labelVersion   = "version"
	labelCondition = "condition"
)

// family is one metric with all its label values.
type family struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

// families are all that a scrape may have, by name.
var families []*prometheus.Desc

func define(kind prometheus.ValueType, name, help string, labels ...string) family {
	f := family{prometheus.NewDesc("weir_"+name, help, labels, nil), kind}
	families = append(families, f.desc)
	return f
}

func counter(name, help string, labels ...string) family {
	return define(prometheus.CounterValue, name, help, labels...)
}

func histogram(name, help string, labels ...string) family {
	return define(prometheus.UntypedValue, name, help, labels...)
}

func gauge(name, help string, labels ...string) family {
	return define(prometheus.GaugeValue, name, help, labels...)
}

// The instance.
var (
	buildInfo      = gauge("build_info", "The version; always 1.", labelVersion)
	startTime      = gauge("start_time_seconds", "When the instance started, seconds since 1970.")
	condition      = gauge("condition", "1 for the instance's condition, 0 for the others.", labelCondition)
	generation     = gauge("config_generation", "Generation of the configuration in force, from 1.")
	reloadOK       = gauge("config_last_reload_successful", "0 while the configuration's files are refused and an older state is in force.")
	restartPending = gauge("config_restart_pending_changes", "Changes in the files that wait for a restart.")
)

// The engines.
var (
	engineEvents   = counter("engine_events_total", "What happened to packets, requests and connections, by reason, over all shards.", labelReason)
	synAnswered    = counter("syn_answered_total", "SYNs that were answered with a cookie.")
	synIgnored     = counter("syn_ignored_total", "SYNs that were not answered: malformed, to a farm that takes no connections, or while stopping.")
	synRefused     = counter("syn_refused_total", "SYNs that were refused by a reset: to VIPs that are gone and whose last connections still run.")
	clientRecords  = gauge("client_connections", "Records of client connections.", labelQueue)
	clientCapacity = gauge("client_connections_capacity", "Records of client connections that fit.", labelQueue)
	serverRecords  = gauge("server_connections", "Records of server connections.", labelQueue)
	serverCapacity = gauge("server_connections_capacity", "Records of server connections that fit.", labelQueue)
	idleRecords    = gauge("server_connections_idle", "Server connections in the pool.", labelQueue)
	embryos        = gauge("embryonic_connections", "Client connections that were opened and have not asked yet.", labelQueue)
	tombstones     = gauge("tombstones", "Client connections that are over and still remembered.", labelQueue)
	heldRequests   = gauge("held_requests", "Client connections of which bytes are held.", labelQueue)
	keptSegments   = gauge("kept_segments", "Segments that are kept beyond a gap.", labelQueue)
	timersArmed    = gauge("timers", "Timers of the engine that are set.", labelQueue)
)

// Queues, emitters and rules.
var (
	queueReceived  = counter("queue_received_packets_total", "Packets that the kernel handed over.", labelQueue)
	queueBytes     = counter("queue_received_bytes_total", "Their bytes.", labelQueue)
	queueBatches   = counter("queue_batches_total", "Batches in which they came.", labelQueue)
	queueGSO       = counter("queue_gso_packets_total", "Packets among them that the kernel will segment.", labelQueue)
	queueVerdicts  = counter("queue_verdicts_total", "Packets by verdict.", labelQueue, labelVerdict)
	queueErrors    = counter("queue_errors_total", "What went wrong between the kernel's queue and the engine.", labelQueue, labelReason)
	queueDropped   = counter("queue_kernel_dropped_packets_total", "Packets that the kernel dropped because the queue or its buffer was full.", labelQueue, labelReason)
	queueWaiting   = gauge("queue_waiting_packets", "Packets that wait for a verdict.", labelQueue)
	emitted        = counter("emitted_packets_total", "Crafted packets that were sent.", labelQueue)
	emittedBytes   = counter("emitted_bytes_total", "Their bytes.", labelQueue)
	emitFailures   = counter("emit_failures_total", "Crafted packets that could not be sent.", labelQueue, labelReason)
	rulesPackets   = counter("firewall_packets_total", "Packets that a rule of Weir's table counted.", labelCounter)
	rulesBytes     = counter("firewall_bytes_total", "Their bytes.", labelCounter)
	rulesRestored  = counter("firewall_restored_total", "Times that Weir's table was put back after somebody had removed or changed it.")
	guardDropped   = counter("firewall_guard_dropped_packets_total", "Untranslated packets that the guard outside nftables has dropped.")
	foreignRules   = gauge("firewall_foreign_findings", "Chains of others that stand in the way of Weir's packets; weir doctor names them.")
	rulesInstalled = gauge("firewall_up", "1 if the counters of Weir's table could be read.")
)

// Farms.
var (
	farmConnections  = counter("farm_client_connections_total", "Client connections that were accepted.", labelFarm)
	farmRequests     = counter("farm_requests_total", "Requests whose head was complete.", labelFarm)
	farmResponses    = counter("farm_responses_total", "Responses of servers that were delivered to the end.", labelFarm)
	farmOwnAnswers   = counter("farm_own_answers_total", "Requests that Weir itself answered.", labelFarm)
	farmOpened       = counter("farm_server_connections_opened_total", "Server connections that were begun.", labelFarm)
	farmReused       = counter("farm_requests_reused_total", "Requests that found an idle server connection.", labelFarm)
	farmRedispatched = counter("farm_requests_redispatched_total", "Requests that went to another server after a failure.", labelFarm)
	farmWaited       = counter("farm_requests_waited_total", "Requests that had to wait for a server connection.", labelFarm)
	farmRefused      = counter("farm_requests_refused_total", "Requests that were refused because they found no server connection.", labelFarm, labelReason)
	farmIn           = counter("farm_request_bytes_total", "Payload from clients to servers.", labelFarm)
	farmOut          = counter("farm_response_bytes_total", "Payload from servers to clients.", labelFarm)
	farmRepeated     = counter("farm_client_retransmitted_segments_total", "Segments that clients sent again.", labelFarm)
	farmClients      = gauge("farm_client_connections", "Client connections that have asked for something.", labelFarm)
	farmMaxClients   = gauge("farm_client_connections_limit", "limits.connections; 0 is no limit.", labelFarm)
	farmNotAdmitted  = counter("farm_client_connections_refused_total", "New client connections that were reset because of limits.connections or limits.per_client.", labelFarm, labelReason)
	farmHeld         = gauge("farm_held_bytes", "Bytes of requests that are held for clients, but for the first 4 KiB of each.", labelFarm)
	farmWaiting      = gauge("farm_waiting_requests", "Requests that wait for a server connection.", labelFarm)
	farmMaxWaiting   = gauge("farm_waiting_requests_limit", "pool.max_waiting; 0 is no limit.", labelFarm)
	farmMaxConns     = gauge("farm_server_connections_limit", "pool.max_connections, per server; 0 is no limit.", labelFarm)
	farmDraining     = gauge("farm_draining_connections", "Connections to servers that were removed from the farm.", labelFarm)
)

// Servers.
var (
	serverState        = gauge("server_state", "1 for the server's state, 0 for the others.", labelFarm, labelServer, labelState)
	serverWeight       = gauge("server_weight", "The configured weight.", labelFarm, labelServer)
	serverOpen         = gauge("server_open_connections", "Connections to the server, those in their handshake too.", labelFarm, labelServer)
	serverConnecting   = gauge("server_connecting_connections", "Connections to the server in their handshake.", labelFarm, labelServer)
	serverIdle         = gauge("server_idle_connections", "Connections to the server without a request.", labelFarm, labelServer)
	serverActive       = gauge("server_active_requests", "Requests that the server has now.", labelFarm, labelServer)
	serverRequests     = counter("server_requests_total", "Requests that were bound to a connection of the server.", labelFarm, labelServer)
	serverResponses    = counter("server_responses_total", "Responses that were delivered to the end.", labelFarm, labelServer)
	serverOpened       = counter("server_connections_opened_total", "Connections that were begun.", labelFarm, labelServer)
	serverEstablished  = counter("server_connections_established_total", "Connections whose handshake was completed.", labelFarm, labelServer)
	serverReused       = counter("server_requests_reused_total", "Requests that found an idle connection.", labelFarm, labelServer)
	serverRedispatched = counter("server_requests_redispatched_total", "Requests that were taken away after a failure.", labelFarm, labelServer)
	serverIn           = counter("server_request_bytes_total", "Payload to the server.", labelFarm, labelServer)
	serverOut          = counter("server_response_bytes_total", "Payload from the server.", labelFarm, labelServer)
	serverClosed       = counter("server_connections_closed_total", "Connections that ended without a failure, by reason.", labelFarm, labelServer, labelReason)
	serverFailed       = counter("server_failures_total", "Failures of the server, by reason.", labelFarm, labelServer, labelReason)
	serverErrors       = counter("server_error_responses_total", "Responses with a status of 500 to 599.", labelFarm, labelServer)
	serverRepeated     = counter("server_retransmitted_segments_total", "Segments that the server sent again.", labelFarm, labelServer)
	requestRepeated    = counter("server_request_retransmitted_segments_total", "Segments of requests that were sent to the server again.", labelFarm, labelServer)
	serverHorizon      = gauge("server_keep_alive_horizon_seconds", "How long the server was seen to keep idle connections; 0 is unknown.", labelFarm, labelServer)
)

// Times, in histograms.
var (
	farmRoundTrip   = histogram("farm_client_round_trip_seconds", "Round-trip time to clients, as their handshakes show it.", labelFarm)
	farmDispatch    = histogram("farm_dispatch_seconds", "From the end of a request's head until it was on its way to a server: what choosing, waiting and connecting add.", labelFarm)
	serverConnect   = histogram("server_connect_seconds", "How long handshakes with the server took.", labelFarm, labelServer)
	serverFirstByte = histogram("server_first_byte_seconds", "From the end of a request's head until the head of its response.", labelFarm, labelServer)
	queueBatchTime  = histogram("queue_batch_seconds", "From the arrival of a batch of packets until their verdicts: what Weir adds to their way.", labelQueue)
)

// Plugins and the access log.
var (
	pluginUp       = gauge("plugin_up", "1 if the plugin runs and answers.", labelPlugin)
	pluginRestarts = counter("plugin_restarts_total", "How often the plugin was started again.", labelPlugin)
	pluginResting  = gauge("plugin_resting", "1 if the plugin ended so often that it is started only now and then.", labelPlugin)
	pluginAnswers  = counter("plugin_questions_total", "Questions to a plugin about requests, by what came of them.", labelPlugin, labelReason)
	pluginTick     = gauge("plugin_last_answer_time_seconds", "When the plugin last answered for the farm, seconds since 1970; 0 is never.", labelPlugin, labelFarm)
	pluginSnapshot = gauge("plugin_snapshot_generation", "Generation of the plugin's last snapshot for the farm; 0 is none.", labelPlugin, labelFarm)
	policyEvents   = counter("policy_events_total", "What a farm's policy did with requests.", labelFarm, labelPlugin, labelReason)
	accessWritten  = counter("access_log_lines_total", "Lines that were written to the access log.")
	accessDropped  = counter("access_log_dropped_total", "Requests that are missing in the access log, because its buffer was full or it could not be written.")
)
