%% A Diameter client and server on Erlang/OTP's own stack, with the base accounting application.
-module(otp_peer).
-export([server/1, server/2, server/3, leaving/3, client/2, client/4, client/5]).
-export([peer_up/3, peer_down/3, pick_peer/4, prepare_request/3, prepare_retransmit/3,
         handle_answer/4, handle_error/4, handle_request/3]).

service(Host) ->
    [{restrict_connections, false}, {'Origin-Host', Host}, {'Origin-Realm', "example.net"}, {'Vendor-Id', 0}, {'Product-Name', "otp"},
     {'Acct-Application-Id', [3]},
     {application, [{alias, acct}, {dictionary, diameter_gen_acct_rfc6733}, {module, ?MODULE}]}].

server(Port) -> server(Port, "server.example.net").

server(Port, Host) -> server(Port, Host, []).

%% Options of the transport: ssl_options for TLS before CER.
server(Port, Host, Options) ->
    {ok, _} = application:ensure_all_started(ssl),
    ok = diameter:start(),
    ok = diameter:start_service(srv, service(Host)),
    {ok, _} = diameter:add_transport(srv, {listen, [{transport_module, diameter_tcp},
        {transport_config, [{reuseaddr, true}, {ip, {127,0,0,1}}, {port, Port} | Options]}]}),
    receive stop -> ok end.

%% A server that leaves soon after somebody has come, with this cause, and is there again at once.
leaving(Port, Host, Cause) ->
    {ok, _} = application:ensure_all_started(ssl),
    ok = diameter:start(),
    ok = diameter:start_service(srv, service(Host)),
    true = diameter:subscribe(srv),
    Listen = {listen, [{transport_module, diameter_tcp},
        {disconnect_cb, fun(_, _, _) -> {dpr, [{cause, Cause}]} end},
        {transport_config, [{reuseaddr, true}, {ip, {127,0,0,1}}, {port, Port}]}]},
    {ok, Ref} = diameter:add_transport(srv, Listen),
    receive {diameter_event, srv, Info} when element(1, Info) == up -> ok end,
    timer:sleep(500),
    ok = diameter:remove_transport(srv, Ref),
    {ok, _} = diameter:add_transport(srv, Listen),
    receive stop -> ok end.

client(Port, Count) -> client(Port, Count, "client.example.net", 1).

%% Count requests by each of so many processes at once, each with a session of its own per request.
client(Port, Count, Host, Parallel) -> client(Port, Count, Host, Parallel, []).

client(Port, Count, Host, Parallel, Options) ->
    {ok, _} = application:ensure_all_started(ssl),
    ok = diameter:start(),
    ok = diameter:start_service(cli, service(Host)),
    true = diameter:subscribe(cli),
    {ok, _} = diameter:add_transport(cli, {connect, [{transport_module, diameter_tcp},
        {transport_config, [{raddr, {127,0,0,1}}, {rport, Port} | Options]}]}),
    up(),
    Self = self(),
    Work = fun() -> Self ! {good, lists:sum([call(Host, N) || N <- lists:seq(1, Count)])} end,
    [spawn_link(Work) || _ <- lists:seq(1, Parallel)],
    Good = lists:sum([receive {good, Part} -> Part end || _ <- lists:seq(1, Parallel)]),
    io:format("~p answered~n", [Good]),
    halt(case Count * Parallel of Good -> 0; _ -> 1 end).

up() ->
    receive
        {diameter_event, cli, Info} when element(1, Info) == up -> ok
    after 15000 ->
        io:format("no connection~n"),
        halt(1)
    end.

call(Host, N) ->
    Session = unicode:characters_to_list(diameter:session_id(Host)),
    Request = ['ACR', {'Session-Id', Session}, {'Accounting-Record-Type', 1},
               {'Accounting-Record-Number', N}, {'Acct-Application-Id', [3]}],
    case diameter:call(cli, acct, Request, []) of
        {ok, Answer} ->
            ['ACA' | Avps] = as_list(Answer),
            Session = unicode:characters_to_list(proplists:get_value('Session-Id', Avps)),
            2001 = proplists:get_value('Result-Code', Avps),
            N = proplists:get_value('Accounting-Record-Number', Avps),
            1;
        Other ->
            io:format("~p~n", [Other]),
            0
    end.

peer_up(_, _, State) -> State.
peer_down(_, _, State) -> State.
pick_peer([Peer | _], _, _, _) -> {ok, Peer}.

%% Of a diameter_packet, the fourth element is the message; of diameter_caps, the second and third
%% are {ours, theirs} of Origin-Host and Origin-Realm.
prepare_request(Packet, _, {_, Caps}) ->
    ['ACR' | Avps] = element(4, Packet),
    {Host, _} = element(2, Caps),
    {Realm, _} = element(3, Caps),
    {send, ['ACR', {'Origin-Host', Host}, {'Origin-Realm', Realm},
            {'Destination-Realm', "example.net"} | Avps]}.

prepare_retransmit(Packet, _, _) -> {send, Packet}.

handle_answer(Packet, _, _, _) -> {ok, element(4, Packet)}.
handle_error(Reason, _, _, _) -> {error, Reason}.

handle_request(Packet, _, {_, Caps}) ->
    ['ACR' | Avps] = as_list(element(4, Packet)),
    {Host, _} = element(2, Caps),
    {Realm, _} = element(3, Caps),
    Same = [{Name, proplists:get_value(Name, Avps)}
            || Name <- ['Session-Id', 'Accounting-Record-Type', 'Accounting-Record-Number']],
    {reply, ['ACA', {'Result-Code', 2001}, {'Origin-Host', Host}, {'Origin-Realm', Realm} | Same]}.

as_list([_ | _] = List) -> List;
as_list(Record) ->
    Dictionary = diameter_gen_acct_rfc6733,
    [Dictionary:rec2msg(element(1, Record)) | Dictionary:'#get-'(Record)].
