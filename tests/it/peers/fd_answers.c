/* A freeDiameter extension that answers accounting requests (RFC 6733 9.7) and credit control
 * requests (RFC 8506), with the members that their answers must repeat. Debian's packages carry no
 * extension that answers anything. */
#include <freeDiameter/extension.h>

static char *repeated[] = { "Accounting-Record-Type", "Accounting-Record-Number", "CC-Request-Type",
	"CC-Request-Number", "Auth-Application-Id", "Acct-Application-Id" };

static int copy(struct msg *from, struct msg *to, char *name)
{
	struct dict_object *model;
	struct avp *found, *made;
	struct avp_hdr *header;

	if (fd_dict_search(fd_g_config->cnf_dict, DICT_AVP, AVP_BY_NAME, name, &model, ENOENT))
		return 0;
	if (fd_msg_search_avp(from, model, &found) || !found)
		return 0;
	CHECK_FCT(fd_msg_avp_hdr(found, &header));
	CHECK_FCT(fd_msg_avp_new(model, 0, &made));
	CHECK_FCT(fd_msg_avp_setvalue(made, header->avp_value));
	return fd_msg_avp_add(to, MSG_BRW_LAST_CHILD, made);
}

static int answer(struct msg **msg, struct avp *avp, struct session *session, void *data,
	enum disp_action *action)
{
	struct msg *request;
	size_t i;

	(void) avp; (void) session; (void) data;
	CHECK_FCT(fd_msg_new_answer_from_req(fd_g_config->cnf_dict, msg, 0));
	CHECK_FCT(fd_msg_answ_getq(*msg, &request));
	CHECK_FCT(fd_msg_rescode_set(*msg, "DIAMETER_SUCCESS", NULL, NULL, 1));
	for (i = 0; i < sizeof(repeated) / sizeof(*repeated); i++)
		CHECK_FCT(copy(request, *msg, repeated[i]));
	*action = DISP_ACT_SEND;
	return 0;
}

static int support(application_id_t id, int auth, char *command)
{
	struct disp_when when;

	memset(&when, 0, sizeof(when));
	CHECK_FCT(fd_dict_search(fd_g_config->cnf_dict, DICT_APPLICATION, APPLICATION_BY_ID, &id,
		&when.app, ENOENT));
	CHECK_FCT(fd_dict_search(fd_g_config->cnf_dict, DICT_COMMAND, CMD_BY_NAME, command,
		&when.command, ENOENT));
	CHECK_FCT(fd_disp_register(answer, DISP_HOW_CC, &when, NULL, NULL));
	return fd_disp_app_support(when.app, NULL, auth, !auth);
}

static int start(char *file)
{
	(void) file;
	CHECK_FCT(support(3, 0, "Accounting-Request"));
	return support(4, 1, "Credit-Control-Request");
}

EXTENSION_ENTRY("fd_answers", start, "dict_dcca");
